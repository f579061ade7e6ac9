"""Weights of the training loss by noise level, for the mean squared error of the velocity.

Every function takes sigma of any shape, in [0, 1], and returns weights of that shape and dtype. The loss is
`mean over the batch of weight(sigma) * mean over elements`, in float32.
"""

import math
from collections.abc import Callable, Mapping
from typing import Final

import torch
from torch import Tensor

from ..errors import ConfigError

_TINY = 1e-5


def signal_to_noise(sigma: Tensor) -> Tensor:
    """Ratio `((1 - sigma) / sigma)^2`, with sigma at least 1e-5."""
    return ((1 - sigma) / sigma.clamp_min(_TINY)) ** 2


def none(sigma: Tensor) -> Tensor:
    """Ones: the plain velocity loss."""
    return torch.ones_like(sigma)


def sigma_sqrt(sigma: Tensor) -> Tensor:
    """`sigma^-2`, as diffusers names it; needs levels kept away from 0."""
    return sigma**-2


def cosmap(sigma: Tensor) -> Tensor:
    """Density of the cosmap law."""
    return 2 / (math.pi * (1 - 2 * sigma + 2 * sigma**2))


def min_snr(sigma: Tensor, gamma: float = 5.0) -> Tensor:
    """`min(SNR, gamma) / SNR` put on the velocity error, as TinyFlux does: 1 near noise, small near data.

    Not what the paper weights; that is `min_snr_x0`.
    """
    snr = signal_to_noise(sigma)
    return snr.clamp_max(_positive(gamma)) / snr.clamp_min(_TINY)


def min_snr_x0(sigma: Tensor, gamma: float = 5.0) -> Tensor:
    """`min(SNR, gamma)` of the error in the clean latents, expressed for the velocity error.

    Source: Hang et al. 2023, arXiv:2303.09556.
    """
    return signal_to_noise(sigma).clamp_max(_positive(gamma)) * sigma**2


def eps(sigma: Tensor) -> Tensor:
    """`(1 - sigma)^2`: the loss of regressing the noise."""
    return (1 - sigma) ** 2


def x0(sigma: Tensor) -> Tensor:
    """`sigma^2`: the loss of regressing the clean latents."""
    return sigma**2


LOSS_WEIGHTS: Final[Mapping[str, Callable[[Tensor], Tensor]]] = {
    "none": none,
    "sigma_sqrt": sigma_sqrt,
    "cosmap": cosmap,
    "min_snr": min_snr,
    "min_snr_x0": min_snr_x0,
    "eps": eps,
    "x0": x0,
}


def _positive(gamma: float) -> float:
    if not gamma > 0:
        raise ConfigError(f"gamma of the min-SNR weight must be above 0, got {gamma}")
    return gamma
