"""The straight path between clean latents and noise, and every reading of a prediction made on it.

One convention holds in the whole project: `sigma` in [0, 1] is the noise level and the time, 1 = pure noise;
`noised = (1 - sigma) * clean + sigma * noise`; `velocity = d noised / d sigma = noise - clean`. Sampling
integrates the velocity from sigma 1 down to 0. Networks that count time the other way are joined here too.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ShapeError

VelocityFn = Callable[[Tensor, Tensor], Tensor]
"""`(noised b ..., sigma b) -> velocity b ...`: a network with its conditions bound."""


@dataclass(frozen=True, slots=True)
class PathSample:
    """A point on the path and the derivative of the path there. Shapes: both `b ...`."""

    noised: Tensor
    velocity: Tensor


def interpolate(clean: Tensor, noise: Tensor, sigma: Tensor) -> PathSample:
    """Point on the straight path from clean latents to noise, and its derivative by sigma.

    Computed in float32 or better and cast back to the dtype of clean.

    Shapes: clean, noise `b ...`; sigma `b`, in [0, 1], 1 = pure noise.

    Raises:
        ShapeError: noise differs in shape from clean, or sigma is not one number per sample.

    Source: Liu et al. 2022, arXiv:2209.03003, eq. 1, with time reversed.
    """
    if noise.shape != clean.shape:
        raise ShapeError(f"noise must have the shape of clean {tuple(clean.shape)}, got {tuple(noise.shape)}")
    level = sigma_like(sigma, clean)
    start, end = clean.to(level.dtype), noise.to(level.dtype)
    noised = (1 - level) * start + level * end
    return PathSample(noised=noised.to(clean.dtype), velocity=(end - start).to(clean.dtype))


def sigma_like(sigma: Tensor, like: Tensor) -> Tensor:
    """Sigma `b` as `b 1 1 ...`, on the device of `like` and in its dtype, but at least float32.

    Raises:
        ShapeError: sigma is not one number per sample of `like`.
    """
    if sigma.ndim != 1 or sigma.shape[0] != like.shape[0]:
        raise ShapeError(f"sigma must hold one number per sample ({like.shape[0]}), got {tuple(sigma.shape)}")
    dtype = torch.promote_types(like.dtype, torch.float32)
    return sigma.to(device=like.device, dtype=dtype).reshape(-1, *[1] * (like.ndim - 1))


def velocity_to_denoised(velocity: Tensor, noised: Tensor, sigma: Tensor) -> Tensor:
    """Estimate of the clean latents, `noised - sigma * velocity`. Shapes: `b ...`; sigma `b`."""
    return (noised - sigma_like(sigma, noised) * velocity).to(noised.dtype)


def velocity_to_noise(velocity: Tensor, noised: Tensor, sigma: Tensor) -> Tensor:
    """Estimate of the noise, `noised + (1 - sigma) * velocity`. Shapes: `b ...`; sigma `b`."""
    return (noised + (1 - sigma_like(sigma, noised)) * velocity).to(noised.dtype)


def velocity_to_score(velocity: Tensor, noised: Tensor, sigma: Tensor) -> Tensor:
    """Gradient of the log density, `-noise / sigma`; sigma above 0. Shapes: `b ...`; sigma `b`."""
    noise = velocity_to_noise(velocity, noised, sigma)
    return (-noise / sigma_like(sigma, noised)).to(noised.dtype)


def denoised_to_velocity(denoised: Tensor, noised: Tensor, sigma: Tensor) -> Tensor:
    """Velocity that predicted clean latents stand for; sigma above 0. Shapes: `b ...`; sigma `b`."""
    return ((noised - denoised) / sigma_like(sigma, noised)).to(noised.dtype)


def noise_to_velocity(noise: Tensor, noised: Tensor, sigma: Tensor) -> Tensor:
    """Velocity that a prediction of the noise stands for. Shapes: `b ...`; sigma `b`.

    Sigma must be below 1, where a noise prediction says nothing about the image: start sampling at 0.999 or
    lower.
    """
    return ((noise - noised) / (1 - sigma_like(sigma, noised))).to(noised.dtype)


def to_data_time(velocity: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """The same prediction for a network whose time runs from noise (0) to data (1); its own inverse.

    Returns: the velocity towards the data, `-velocity`, and the data time, `1 - sigma`.
    """
    return -velocity, 1 - sigma


def from_data_time(network: VelocityFn) -> VelocityFn:
    """Velocity function of a network `(noised, data time) -> data - noise`."""

    def velocity(noised: Tensor, sigma: Tensor) -> Tensor:
        return -network(noised, 1 - sigma)

    return velocity


def offset_noise(noise: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Noise plus one more normal number per sample and channel, times strength; for training only.

    Shapes: noise `b c ...`. The numbers are drawn on the generator's device.
    """
    shape = (*noise.shape[:2], *[1] * (noise.ndim - 2))
    level = torch.randn(shape, generator=generator, device=generator.device, dtype=torch.float32)
    return noise + strength * level.to(device=noise.device, dtype=noise.dtype)
