"""Teachers on the variance-preserving path (Stable Diffusion 1.5), read on the straight path.

Such a network sees `x_vp = a * clean + s * noise` with `a = sqrt(alpha_bar)`, `s = sqrt(1 - alpha_bar)`. The
same clean latents and noise at `sigma = s / (a + s)` give `noised = x_vp / (a + s)` on the straight path.
"""

import torch
from torch import Tensor

from .path import sigma_like


def sigma_to_alpha_bar(sigma: Tensor) -> Tensor:
    """Signal share alpha_bar in [0, 1] of the point of the other path with the same signal-to-noise ratio."""
    return (1 - sigma) ** 2 / ((1 - sigma) ** 2 + sigma**2)


def alpha_bar_to_sigma(alpha_bar: Tensor) -> Tensor:
    """Sigma in [0, 1] with the signal-to-noise ratio `alpha_bar / (1 - alpha_bar)`."""
    signal, noise = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    return noise / (signal + noise)


def noised_to_vp(noised: Tensor, sigma: Tensor) -> Tensor:
    """The point of the variance-preserving path for noised latents. Shapes: `b ...`; sigma `b`."""
    return (noised / _length(sigma, noised)).to(noised.dtype)


def vp_to_noised(vp: Tensor, sigma: Tensor) -> Tensor:
    """Inverse of `noised_to_vp`. Shapes: `b ...`; sigma `b`."""
    return (vp * _length(sigma, vp)).to(vp.dtype)


def vp_noise_to_velocity(noise: Tensor, vp: Tensor, sigma: Tensor) -> Tensor:
    """Velocity from a teacher that predicts the noise; sigma below 1. Shapes: `b ...`; sigma `b`."""
    signal_weight, noise_weight = _weights(sigma, vp)
    denoised = (vp - noise_weight * noise) / signal_weight
    return (noise - denoised).to(vp.dtype)


def vp_velocity_to_velocity(vp_velocity: Tensor, vp: Tensor, sigma: Tensor) -> Tensor:
    """Velocity from a teacher's v-prediction `a * noise - s * clean`. Shapes: `b ...`; sigma `b`."""
    signal_weight, noise_weight = _weights(sigma, vp)
    denoised = signal_weight * vp - noise_weight * vp_velocity
    noise = noise_weight * vp + signal_weight * vp_velocity
    return (noise - denoised).to(vp.dtype)


def velocity_to_vp_velocity(velocity: Tensor, noised: Tensor, sigma: Tensor) -> Tensor:
    """The v-prediction `a * noise - s * clean` that a velocity stands for. Shapes: `b ...`; sigma `b`."""
    level = sigma_like(sigma, noised)
    signal_weight, noise_weight = _weights(sigma, noised)
    denoised = noised - level * velocity
    return (signal_weight * (denoised + velocity) - noise_weight * denoised).to(noised.dtype)


def scaled_linear_alpha_bar(num_levels: int = 1000, first: float = 0.00085, last: float = 0.012) -> Tensor:
    """Stable Diffusion 1.5's alpha_bar: betas linear in their square roots. Shape: `num_levels`, float64."""
    betas = torch.linspace(first**0.5, last**0.5, num_levels, dtype=torch.float64) ** 2
    return torch.cumprod(1 - betas, dim=0)


def sigma_to_index(sigma: Tensor, alpha_bar: Tensor) -> Tensor:
    """Position of sigma in a teacher's table, linear in `log(sigma / (1 - sigma))` between two entries.

    Levels outside the table give its first or last index. Round for a network that takes whole indices.

    Shapes: sigma `b`, in (0, 1); alpha_bar `k`, descending; result `b`, float64 on the device of sigma.
    """
    table = torch.logit(alpha_bar_to_sigma(alpha_bar.to(device=sigma.device, dtype=torch.float64)))
    level = torch.logit(sigma.to(torch.float64)).clamp(table[0], table[-1])
    upper = torch.searchsorted(table, level).clamp(1, table.shape[0] - 1)
    lower = upper - 1
    return lower + (level - table[lower]) / (table[upper] - table[lower])


def _length(sigma: Tensor, like: Tensor) -> Tensor:
    level = sigma_like(sigma, like)
    return ((1 - level) ** 2 + level**2).sqrt()


def _weights(sigma: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    level, length = sigma_like(sigma, like), _length(sigma, like)
    return (1 - level) / length, level / length
