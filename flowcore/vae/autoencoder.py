"""KL autoencoders (SD, SDXL, EQ-SDXL, FLUX.1, the bundled one) as images <-> model-space latents.

The network is diffusers' AutoencoderKL; importing this file imports diffusers.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from ..assets import resolve
from ..errors import CheckpointError, ConfigError, ShapeError
from ..weights.atomic import write_tensors
from ..weights.checkpoint import read_tensors
from ..weights.strict import assign_strict
from .config import checked_config, infer_config
from .keys import find_prefix, to_diffusers
from .latent_spec import (
    LATENT_SPECS,
    LatentSpec,
    scaled_spec,
    spec_from_metadata,
    spec_from_statistics,
)

FOLDER_WEIGHTS = "diffusion_pytorch_model.safetensors"


class Autoencoder:
    """An AutoencoderKL together with its latent space.

    The network computes in its own dtype; what goes in is cast to it, what comes out is float32. Its weights
    are frozen: they take no gradient, inputs do.
    """

    def __init__(self, module: AutoencoderKL, spec: LatentSpec) -> None:
        """Join a network and a latent space; ConfigError if the channels or the downscale factor differ."""
        channels = int(module.config["latent_channels"])
        downscale = _downscale(module.config)
        if (channels, downscale) != (spec.channels, spec.downscale):
            raise ConfigError(
                f"the latent space {spec.name} ({spec.channels} channels, 1/{spec.downscale}) must fit its "
                f"autoencoder, got {channels} channels, 1/{downscale}"
            )
        self.module = module.eval().requires_grad_(False)
        self.spec = spec

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        device: torch.device = next(self.module.parameters()).device
        return device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        dtype: torch.dtype = next(self.module.parameters()).dtype
        return dtype

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "Autoencoder":
        """Move the weights in place and return self."""
        _move(self.module, device, dtype)
        return self

    def encode(self, images: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Return model-space latents `b c h w`, float32.

        Args:
            images: `b 3 height width` in [-1, 1]; both sides multiples of `spec.downscale`.
            generator: with it a sample of the posterior is returned, without it the mode.
        Raises: ShapeError for other sizes.
        """
        side = self.spec.downscale
        if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] % side or images.shape[3] % side:
            raise ShapeError(
                f"images must be `b 3 height width` with sides that are multiples of {side}, "
                f"got {tuple(images.shape)}"
            )
        posterior = self.module.encode(images.to(self.device, self.dtype)).latent_dist
        raw = posterior.mode() if generator is None else posterior.sample(generator)
        return self.spec.to_model(raw.float())

    def decode(self, latents: Tensor) -> Tensor:
        """Return images `b 3 height width` in [-1, 1], float32, of model-space latents `b c h w`.

        Raises: ShapeError if the latents have other axes or channels.
        """
        raw = self.spec.from_model(latents.to(self.device, torch.float32))
        images: Tensor = self.module.decode(raw.to(self.dtype)).sample
        return images.float().clamp(-1.0, 1.0)


def build_autoencoder(
    config: Mapping[str, Any], *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> AutoencoderKL:
    """Return a network of the given settings, with random weights, or none on the device "meta".

    Raises: ConfigError if a setting is unknown or does not fit.
    """
    values = checked_config(config, source="this VAE")
    try:
        with torch.device(device):
            module = AutoencoderKL(**values)
    except (TypeError, ValueError) as err:
        raise ConfigError(
            f"settings of the VAE must fit AutoencoderKL, got {' '.join(str(err).split())}"
        ) from err
    return _move(module, None, dtype)


def load_vae(
    path_or_name: str | Path,
    *,
    spec: str | LatentSpec | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = torch.float32,
) -> Autoencoder:
    """Return the autoencoder of a safetensors file, a diffusers folder, or a bundled name.

    Args:
        path_or_name: keys as diffusers, BFL or the original `ldm` code name them, also inside a whole
            checkpoint under `vae.` or `first_stage_model.`.
        spec: the latent space, used when the file does not state its own (SD1.5 and SDXL files do not, and
            look alike).
        device: where the weights go.
        dtype: of weights and computation; None keeps the file's.
    Raises: CheckpointError or ConfigError, naming the file.
    """
    path = resolve(path_or_name)
    tensors, metadata, stated = _read(path)
    prefix = find_prefix(tensors, source=path.name)
    own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    state = to_diffusers({name: own[name] for name in own if name not in ("vae_mean", "vae_std")})
    config = checked_config(stated, source=path.name) if stated else infer_config(state, source=path.name)
    module = build_autoencoder(config, device="meta")
    assign_strict(module, state, source=path.name, what="AutoencoderKL")
    side = _downscale(config)
    found = (
        _tensor_spec(tensors, prefix)
        or spec_from_metadata(metadata, source=path.name, downscale=side)
        or _config_spec(config, side)
        or _given_spec(spec, module.config["latent_channels"], path.name)
    )
    return Autoencoder(module, found).to(device, dtype)


def save_autoencoder(
    path: str | Path, module: AutoencoderKL, spec: LatentSpec, *, metadata: Mapping[str, str] | None = None
) -> None:
    """Write network, settings and latent space to one safetensors file, replacing an earlier one."""
    config = {key: value for key, value in module.config.items() if not key.startswith("_")}
    own = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "AutoencoderKL",
        "flowcore.config": json.dumps(config),
        "flowcore.latent_spec": spec.name,
        "flowcore.latents_mean": json.dumps(list(spec.mean)),
        "flowcore.latents_std": json.dumps(list(spec.std)),
    }
    write_tensors(path, module.state_dict(), {**(metadata or {}), **own})


def _move(
    module: AutoencoderKL, device: torch.device | str | None, dtype: torch.dtype | None
) -> AutoencoderKL:
    """Move the weights in place, as torch does (the class's own `to` logs a warning at each)."""
    torch.nn.Module.to(module, device=device, dtype=dtype)
    return module


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str], dict[str, Any]]:
    """Return tensors, string metadata, and the settings that the file or the folder states ({} if none)."""
    if not path.is_dir():
        tensors, metadata = read_tensors(path)
        return (
            tensors,
            metadata,
            _json(metadata.get("flowcore.config", "{}"), f"flowcore.config in {path.name}"),
        )
    config = path / "config.json"
    if not config.is_file() or not (path / FOLDER_WEIGHTS).is_file():
        raise CheckpointError(
            f"a VAE folder must hold config.json and {FOLDER_WEIGHTS}, got {path} without them"
        )
    tensors, metadata = read_tensors(path / FOLDER_WEIGHTS)
    return tensors, metadata, _json(config.read_text(encoding="utf-8"), str(config))


def _json(text: str, source: str) -> dict[str, Any]:
    """Return the JSON object of a text."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as err:
        raise CheckpointError(f"{source} must be a JSON object, got {err}") from err
    if not isinstance(value, dict):
        raise CheckpointError(f"{source} must be a JSON object, got {type(value).__name__}")
    return value


def _tensor_spec(tensors: Mapping[str, Tensor], prefix: str) -> LatentSpec | None:
    """Return the space stored as tensors: single-file EQ checkpoints hold `vae_mean` and `vae_std`."""
    for start in ("", prefix):
        if f"{start}vae_mean" in tensors and f"{start}vae_std" in tensors:
            mean, std = (tensors[f"{start}vae_{part}"].float().flatten().tolist() for part in ("mean", "std"))
            return spec_from_statistics(mean, std)
    return None


def _config_spec(config: Mapping[str, Any], downscale: int) -> LatentSpec | None:
    """Return the space that the settings state, as the files of diffusers do."""
    if config.get("latents_mean") and config.get("latents_std"):
        return spec_from_statistics(config["latents_mean"], config["latents_std"], downscale=downscale)
    if "scaling_factor" not in config:
        return None
    shift = config.get("shift_factor") or 0.0
    channels = int(config.get("latent_channels", 4))
    scaled = scaled_spec("custom", channels=channels, scale=config["scaling_factor"], shift=shift)
    return spec_from_statistics(scaled.mean, scaled.std, downscale=downscale)


def _given_spec(given: str | LatentSpec | None, channels: int, source: str) -> LatentSpec:
    """Return the space that the caller names; ConfigError if there is none."""
    if isinstance(given, LatentSpec):
        return given
    if given in LATENT_SPECS:
        return LATENT_SPECS[given]
    fitting = [spec.name for spec in LATENT_SPECS.values() if spec.channels == channels]
    raise ConfigError(
        f"the latent space of {source} must be named, as the file does not state it, got {given}; "
        f"pass spec= as one of {', '.join(fitting)}"
    )


def _downscale(config: Mapping[str, Any]) -> int:
    """Return the side of a latent cell in pixels."""
    return int(2 ** (len(config["block_out_channels"]) - 1))
