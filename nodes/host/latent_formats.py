"""The latent space of a model in the form that ComfyUI's samplers and previews use."""

import json
from collections.abc import Mapping

import comfy.latent_formats
import torch
from torch import Tensor

from ...flowcore.errors import CheckpointError, ShapeError
from ...flowcore.flux import SpacePair
from ...flowcore.vae.latent_spec import LATENT_SPECS, LatentSpec, spec_from_metadata

# ComfyUI's name of the space, or of another one of the same VAE; its factors for previews are used.
_KNOWN = {"sd15": "SD15", "sdxl": "SDXL", "sd3": "SD3", "flux1": "Flux", "flux1-unshifted": "Flux"}


class FlowCoreLatentFormat(comfy.latent_formats.LatentFormat):
    """Raw latents to model space and back by a LatentSpec, with a linear preview where factors are known."""

    def __init__(
        self,
        spec: LatentSpec,
        rgb_factors: list[list[float]] | None = None,
        rgb_bias: list[float] | None = None,
    ) -> None:
        """Take the space, and the colour of each model-space channel when it is known."""
        self.spec = spec
        self.latent_channels = spec.channels
        self.downscale = spec.downscale
        self.latent_rgb_factors = rgb_factors
        self.latent_rgb_factors_bias = rgb_bias
        known = getattr(comfy.latent_formats, _KNOWN.get(spec.name, ""), None)
        if known is not None and rgb_factors is None:
            stock = known()
            # Our space may lie shifted against the stock one: what its zero is there adds to the bias.
            zero = stock.process_in(spec.from_model(torch.zeros(1, spec.channels, 1, 1))).flatten()
            bias = torch.tensor(stock.latent_rgb_factors_bias or [0.0] * 3)
            self.latent_rgb_factors = stock.latent_rgb_factors
            self.latent_rgb_factors_bias = (bias + zero @ torch.tensor(stock.latent_rgb_factors)).tolist()
            self.taesd_decoder_name = stock.taesd_decoder_name

    def process_in(self, latent: Tensor) -> Tensor:
        """Return model-space latents of raw ones.

        Raises: ShapeError if they come from a VAE with another number of channels.
        """
        if latent.ndim != 4 or latent.shape[1] != self.spec.channels:
            raise ShapeError(
                f"latents for this model must have {self.spec.channels} channels ({self.spec.name}), got "
                "shape "
                f"{tuple(latent.shape)}; encode with the VAE that the model was trained with"
            )
        return self.spec.to_model(latent)

    def process_out(self, latent: Tensor) -> Tensor:
        """Return raw latents of model-space ones."""
        return self.spec.from_model(latent)

    def metadata(self) -> dict[str, str]:
        """Return the metadata that `format_of` reads back to the same format."""
        spec = self.spec
        found = {
            "flowcore.latent_spec": spec.name,
            "flowcore.latents_mean": json.dumps(list(spec.mean)),
            "flowcore.latents_std": json.dumps(list(spec.std)),
        }
        if self.latent_rgb_factors is not None and spec.name not in _KNOWN:
            found["flowcore.latent_rgb_factors"] = json.dumps(self.latent_rgb_factors)
            found["flowcore.latent_rgb_bias"] = json.dumps(self.latent_rgb_factors_bias)
        return found


class SequenceFormat(comfy.latent_formats.LatentFormat):
    """Normalised tokens as they are, `b c n`; holds the spaces that a model was trained between."""

    latent_dimensions = 1

    def __init__(self, spaces: SpacePair) -> None:
        """Take the spaces; sequences have no linear preview."""
        self.spaces = spaces
        self.latent_channels = spaces.data.codec.channels

    @property
    def shape(self) -> tuple[int, int]:
        """Channels and number of the data's tokens."""
        return self.latent_channels, self.spaces.data_positions().shape[1]

    def metadata(self) -> dict[str, str]:
        """Return the metadata that `SpacePair.from_metadata` reads."""
        return self.spaces.to_metadata()


def format_of(metadata: Mapping[str, str], default: str, source: str) -> FlowCoreLatentFormat:
    """Return the latent format that a model file states, else that of the architecture's space.

    Raises: CheckpointError if what the file states cannot be read.
    """
    factors = _json_list(metadata, "flowcore.latent_rgb_factors", source)
    bias = _json_list(metadata, "flowcore.latent_rgb_bias", source)
    spec = spec_from_metadata(metadata, source=source) or LATENT_SPECS[default]
    if factors is not None and len(factors) != spec.channels:
        factors, bias = None, None  # of another space: no preview is better than a wrong one
    return FlowCoreLatentFormat(spec, factors, bias)


def _json_list(metadata: Mapping[str, str], key: str, source: str) -> list | None:
    """Return the list under a key, None if there is none."""
    if key not in metadata:
        return None
    try:
        value = json.loads(metadata[key])
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{key} in {source} must be a JSON list, got {metadata[key][:40]!r}") from error
    if value is not None and not isinstance(value, list):
        raise CheckpointError(f"{key} in {source} must be a JSON list, got {type(value).__name__}")
    return value
