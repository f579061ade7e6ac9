"""The terms of Exo's loss besides the velocity's: what an edit keeps and marks, and likeness of pictures."""

from __future__ import annotations

from typing import Protocol

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional

from flowcore.errors import ConfigError
from flowcore.models.exo.grids import CELL
from flowcore.models.exo.labels import changed_cells
from flowcore.vae.autoencoder import Autoencoder
from training.encoders import FileImageEncoder, ImageEncoder

PERCEPTUAL_BELOW = 0.7
"""Noise level from which on the estimate of the clean latents is no picture yet."""
CROP = 256
"""Pixels a side of the crops that LPIPS compares."""


class Likeness(Protocol):
    """A distance of two pictures in latents, one value each."""

    def __call__(self, found: Tensor, wanted: Tensor, generator: torch.Generator) -> Tensor:
        """Distance `b`, float32, of latents `b c h w`; gradients run to `found`."""


def kept_and_changed(mask: Tensor, estimate: Tensor, reference: Tensor, clean: Tensor) -> Tensor:
    """R of exo.md 10.2: squared error where the mask takes the estimate, and elsewhere the reference.

    Shapes: mask `b hm wm`, spread to latents by the nearest cell; the others `b c h w`.
    """
    rows, columns = clean.shape[-2:]
    spread = mask.repeat_interleave(CELL, dim=1).repeat_interleave(CELL, dim=2)[:, None, :rows, :columns]
    return functional.mse_loss(torch.lerp(reference, estimate, spread), clean)


def label_loss(mask: Tensor, source: Tensor, clean: Tensor, sparsity: float) -> Tensor:
    """Cross-entropy of a mask `b hm wm` against the cells that it pays to mark, of latents `b c h w`."""
    labels = changed_cells(source, clean, sparsity).float()
    with torch.autocast(mask.device.type, enabled=False):
        return functional.binary_cross_entropy(mask.float(), labels)


class DecoderLikeness:
    """Squared difference of the frozen decoder's first activations, of unit length over channels."""

    def __init__(self, autoencoder: Autoencoder) -> None:
        """Take an autoencoder, whose weights stay."""
        self.autoencoder = autoencoder

    def __call__(self, found: Tensor, wanted: Tensor, generator: torch.Generator) -> Tensor:
        """As `Likeness`; nothing is drawn."""
        del generator
        with torch.no_grad():
            expected = self._features(wanted)
        return (self._features(found) - expected).square().mean(dim=(1, 2, 3))

    def _features(self, latents: Tensor) -> Tensor:
        return functional.normalize(self.autoencoder.features(latents).float(), dim=1)


class LpipsLikeness:
    """LPIPS with VGG, package lpips, of a random crop of both pictures."""

    def __init__(self, autoencoder: Autoencoder) -> None:
        """Take an autoencoder, whose weights stay. Raises: ConfigError if the package is not installed."""
        try:
            from lpips import LPIPS
        except ImportError as err:
            raise ConfigError(
                "train.exo.features must be decoder_mid or none without the package lpips, got lpips; "
                "run: pip install lpips"
            ) from err
        self.autoencoder = autoencoder
        self.network = LPIPS(net="vgg", verbose=False).eval().requires_grad_(False)

    def __call__(self, found: Tensor, wanted: Tensor, generator: torch.Generator) -> Tensor:
        """As `Likeness`; the crop is the same for the whole batch."""
        side = CROP // self.autoencoder.spec.downscale
        starts = [
            int(torch.randint(max(1, length - side + 1), (1,), generator=generator))
            for length in found.shape[-2:]
        ]
        crops = [x[..., starts[0] : starts[0] + side, starts[1] : starts[1] + side] for x in (found, wanted)]
        pictures = [self.autoencoder.decode(crop) for crop in crops]
        self.network.to(pictures[0].device)
        distances: Tensor = rearrange(self.network(*pictures), "b 1 1 1 -> b")
        return distances


def likeness(kind: str, encoder: ImageEncoder) -> Likeness | None:
    """The distance of a name; None for `none`, and where pictures are no autoencoder's.

    Raises: ConfigError if a package that it needs is not installed.
    """
    if kind == "none" or not isinstance(encoder, FileImageEncoder):
        return None
    return LpipsLikeness(encoder.autoencoder) if kind == "lpips" else DecoderLikeness(encoder.autoencoder)
