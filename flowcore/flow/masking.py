"""Starting from an image, generating only a part of it, and running the path backwards."""

import torch
from torch import Tensor

from ..errors import ShapeError
from .path import VelocityFn, interpolate, sigma_like
from .solvers import euler
from .steps import Solver, StepCallback

INVERSION_FLOOR = 1e-4
"""Lowest level at which the network is asked on the way up; training draws no lower one."""


def noise_to_strength(clean: Tensor, noise: Tensor, sigmas: Tensor) -> Tensor:
    """State from which a run over the grid starts: clean latents noised to its first level.

    With sigmas[0] = 1 it is the noise itself. For image-to-image take `sigma_grid(..., strength=...)`.

    Shapes: clean, noise and result `b ...`; sigmas `n + 1`.

    Raises:
        ShapeError: noise differs in shape from clean.
    """
    return interpolate(clean, noise, sigmas[:1].expand(clean.shape[0])).noised


def masked_velocity(velocity: VelocityFn, mask: Tensor, clean: Tensor, noise: Tensor) -> VelocityFn:
    """Velocity function that generates where the mask is 1 and keeps the clean latents where it is 0.

    Before each call the kept part is put back on its path from `clean` to `noise`, and the denoised estimate
    is blended with `clean` after it; the solver's own state is never touched. The kept part therefore ends at
    `clean` with every solver, up to rounding (`restore_kept` removes that too). Values between 0 and 1 blend.

    Apply it around guidance, not inside. The run must start from the same noise (`noise_to_strength`).

    Shapes: mask broadcastable to `b ...`; clean, noise `b ...`.

    Raises:
        ShapeError: the shapes do not fit, or the mask has values outside [0, 1].
    """
    if noise.shape != clean.shape:
        raise ShapeError(f"noise must have the shape of clean {tuple(clean.shape)}, got {tuple(noise.shape)}")
    _check_mask(mask, clean)

    def masked(x: Tensor, sigma: Tensor) -> Tensor:
        level = sigma_like(sigma, x)
        fresh = mask.to(level)
        kept, source, source_noise = 1 - fresh, clean.to(level), noise.to(level)
        on_path = (1 - level) * source + level * source_noise
        blended = fresh * x + kept * on_path
        predicted = velocity(blended.to(x.dtype), sigma).to(level.dtype)
        denoised = fresh * (blended - level * predicted) + kept * source
        at_data = fresh * predicted + kept * (source_noise - source)
        return torch.where(level > 0, (x - denoised) / level, at_data).to(x.dtype)

    return masked


def restore_kept(x: Tensor, mask: Tensor, clean: Tensor) -> Tensor:
    """The result of a masked run with the clean latents, bit for bit, where the mask is 0. Shapes: as above.

    Raises:
        ShapeError: the shapes do not fit.
    """
    if x.shape != clean.shape:
        raise ShapeError(f"result must have the shape of clean {tuple(clean.shape)}, got {tuple(x.shape)}")
    return torch.where(mask.to(x.device) == 0, clean.to(x), x)


def invert(
    velocity: VelocityFn,
    clean: Tensor,
    sigmas: Tensor,
    *,
    solver: Solver = euler,
    callback: StepCallback | None = None,
) -> Tensor:
    """Noised latents at sigmas[0] from which sampling over the grid leads back to `clean`, for editing.

    The grid is that of sampling (descending) and is run backwards; the network is asked at sigma 1e-4 where
    the path stands at 0. Solvers that need a descending grid refuse.

    Shapes: clean and result `b ...`; sigmas `n + 1`.

    Raises:
        ConfigError: the grid does not descend, or the solver cannot run upwards.
    """

    def above_floor(x: Tensor, sigma: Tensor) -> Tensor:
        return velocity(x, sigma.clamp_min(INVERSION_FLOOR))

    return solver(above_floor, clean, sigmas.flip(0), callback=callback)


def _check_mask(mask: Tensor, clean: Tensor) -> None:
    sizes = zip(reversed(mask.shape), reversed(clean.shape), strict=False)
    if mask.ndim > clean.ndim or any(size not in (1, whole) for size, whole in sizes):
        raise ShapeError(f"mask must broadcast to the latents {tuple(clean.shape)}, got {tuple(mask.shape)}")
    low, high = (float(bound) for bound in torch.aminmax(mask.to(torch.float32)))
    if not (low >= 0 and high <= 1):
        raise ShapeError(f"mask must hold values in [0, 1], got {low:g} to {high:g}")
