"""Masks of Exo's edits, a value in 0..1 for each memory cell, on latents and pixels, and what they keep."""

from collections.abc import Callable, Sequence

from torch import Tensor
from torch.nn import functional

from ..errors import ConfigError
from ..flow.path import VelocityFn, denoised_to_velocity, velocity_to_denoised
from ..models.exo.grids import CELL

MODES = ("bilinear", "nearest")
LATE = 0.3
"""Level below which masks count for a picture, and from which on the rest is kept: edits show late."""
_LOW, _RANGE = 0.2, 0.4
_CLOSE = 1e-6


def stretch(mask: Tensor) -> Tensor:
    """Return the mask with more contrast: 0 up to 0.2, 1 from 0.6 on."""
    return ((mask - _LOW) / _RANGE).clamp(0, 1)


def on_latents(mask: Tensor, size: tuple[int, int]) -> Tensor:
    """Return the mask `b 1 h w` on latents of a size, of one on memory cells `b hm wm`."""
    whole = mask.repeat_interleave(CELL, dim=-2).repeat_interleave(CELL, dim=-1)
    return whole[:, None, : size[0], : size[1]]


def on_pixels(mask: Tensor, size: tuple[int, int], downscale: int, mode: str = "bilinear") -> Tensor:
    """Return the mask `b y x` on the pixels of a picture, of one on memory cells `b hm wm`.

    Args:
        mask: cells at the right and bottom may reach beyond the picture.
        size: rows and columns of the latents.
        downscale: pixels on a side of a latent.
        mode: "bilinear", or "nearest": each cell a square.

    Raises: ConfigError for another mode.
    """
    if mode not in MODES:
        raise ConfigError(f"the mode of a mask must be one of {', '.join(MODES)}, got {mode!r}")
    side = CELL * downscale
    whole = functional.interpolate(
        mask[:, None].float(),
        size=(mask.shape[-2] * side, mask.shape[-1] * side),
        mode=mode,
        align_corners=False if mode == "bilinear" else None,
    )
    return whole[:, 0, : size[0] * downscale, : size[1] * downscale]


def late_level(levels: Sequence[float]) -> float:
    """Return the highest level whose masks count, of those of a run's steps: below LATE, else the last."""
    return max((level for level in levels if level < LATE), default=levels[-1])


def preserving(
    velocity: VelocityFn, mask: Callable[[], Tensor], clean: Tensor, amount: float, start: float
) -> VelocityFn:
    """Velocity function that leads to `clean` where the mask is 0, by an amount in [0, 1].

    Above the level start nothing is kept yet: what the masks of much noise miss would show no change later.
    mask: gives that of the last call of velocity, `b 1 h w`. With amount 1 the run ends at `clean` where the
    mask of its last call is 0.
    Shapes: clean `b c h w`.
    """

    def preserved(x: Tensor, sigma: Tensor) -> Tensor:
        denoised = velocity_to_denoised(velocity(x, sigma), x, sigma)
        is_late = (sigma < start + _CLOSE)[:, None, None, None]
        kept = amount * (1 - mask().to(x)) * is_late
        return denoised_to_velocity(denoised + kept * (clean.to(x) - denoised), x, sigma)

    return preserved
