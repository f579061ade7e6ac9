"""Samples of a Flux between sequences: from what ComfyUI passes to its tokens, and back."""

from typing import Any

import comfy.model_management as mm
import comfy.utils
import numpy as np
import torch
from comfy.model_patcher import ModelPatcher
from einops import rearrange
from torch import Tensor

from ...flowcore.errors import ConfigError, ShapeError
from ...flowcore.flux import (
    Codec,
    Dct,
    Patches,
    conditioning_of,
    draw_samples,
    samples_from_text,
    samples_to_text,
)
from .latent_formats import SequenceFormat
from .sequence_conds import entries

Latent = dict[str, Any]
Conditioning = list[list[Any]]


class Source:
    """Samples in the place of noise, in the form of ComfyUI's NOISE: a path may begin at data."""

    seed = 0

    def __init__(self, tokens: Tensor) -> None:
        """Take tokens `b c n`."""
        self.tokens = tokens

    def generate_noise(self, latent: Latent) -> Tensor:
        """Return the tokens, as many as there are sequences in the latent."""
        return comfy.utils.repeat_to_batch_size(self.tokens, latent["samples"].shape[0]).cpu()


def make_conditioning(
    model: ModelPatcher, numbers: str, image: Tensor | None, latent: Latent | None
) -> tuple[Conditioning, Conditioning]:
    """Return the conditioning of samples of the condition space, and that of none: tokens of zeros.

    Raises: ConfigError or ShapeError if the samples are not of that space, or the model has none.
    """
    spaces = _format(model).spaces
    made = conditioning_of(spaces, _read(spaces.condition.codec, numbers, image, latent))
    tokens = made.context
    return [[tokens, entries(made)]], [[torch.zeros_like(tokens), entries(made)]]


def make_empty(model: ModelPatcher, batch_size: int) -> Latent:
    """Return zeros `b c n` in the place of data. Raises: ConfigError if the model is none of sequences."""
    return {"samples": torch.zeros(batch_size, *_format(model).shape, device=mm.intermediate_device())}


def encode(
    model: ModelPatcher, numbers: str, image: Tensor | None, latent: Latent | None
) -> tuple[Latent, Source]:
    """Return the tokens `b c n` of samples of the data space, as a latent and as a path's beginning.

    Raises: ConfigError or ShapeError if the samples are not of that space, or the model has none.
    """
    spaces = _format(model).spaces
    coded = spaces.encode_data(_read(spaces.data.codec, numbers, image, latent)).tokens
    tokens = rearrange(coded, "b n c -> b c n").to(mm.intermediate_device())
    return {"samples": tokens}, Source(tokens)


def decode(model: ModelPatcher, latent: Latent) -> tuple[str, Latent]:
    """Return the samples of tokens `b c n`, as JSON and as they are. Raises: as `_samples`."""
    samples = _samples(model, latent)
    return samples_to_text(samples, _format(model).spaces.data.codec), {"samples": samples}


def preview(model: ModelPatcher, latent: Latent, side: int) -> Tensor:
    """Return pictures `b y x 3` in [0, 1] of the samples of tokens `b c n`. Raises: as `_samples`."""
    pictures = draw_samples(_format(model).spaces.data.codec, _samples(model, latent), side)
    return torch.stack([torch.from_numpy(np.array(picture)) for picture in pictures]).float() / 255


def _format(model: ModelPatcher) -> SequenceFormat:
    found = model.get_model_object("latent_format")
    if not isinstance(found, SequenceFormat):
        raise ConfigError("model must be a Flux between sequences, got another; use Load Flux Sequences")
    return found


def _samples(model: ModelPatcher, latent: Latent) -> Tensor:
    """Return the samples `b ...` of tokens. Raises: ShapeError if they are not as many as the model makes."""
    tokens, shape = latent["samples"], _format(model).shape
    if tuple(tokens.shape[1:]) != shape:
        raise ShapeError(
            f"latent must be b {shape[0]} {shape[1]} as this model makes it, got {tuple(tokens.shape)}"
        )
    return _format(model).spaces.data.decode(rearrange(tokens.float(), "b c n -> b n c"))


def _read(codec: Codec, numbers: str, image: Tensor | None, latent: Latent | None) -> Tensor:
    """Return samples `b ...` of the one source that is given.

    Raises: ConfigError if none or several are given, or a picture for what is none.
    """
    given = {"numbers": numbers.strip() or None, "image": image, "latent": latent}
    names = [name for name, value in given.items() if value is not None]
    if len(names) != 1:
        raise ConfigError(f"one of numbers, image and latent must be given, got {', '.join(names) or 'none'}")
    if latent is not None:
        return latent["samples"].float()
    if image is None:
        return samples_from_text(numbers, codec)
    if not isinstance(codec, Patches | Dct) or codec.colors not in (1, 3):
        raise ConfigError(f"image must be left out, for this {codec.kind} space holds no pictures; got one")
    pixels = rearrange(image[..., :3], "b y x c -> b c y x") * 2 - 1
    return pixels.mean(dim=1, keepdim=True) if codec.colors == 1 else pixels
