"""Guidance: two velocities, with and without the condition, made into the one that the solver follows.

A rule (`Combine`) mixes the two velocities; `guided` and `guided_pair` decide when both are needed and ask
the network. Rules act on velocities except adaptive projected guidance, which acts on the denoised estimates.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ConfigError
from .path import VelocityFn, sigma_like

PairFn = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""`(x b ..., sigma b) -> (conditional, unconditional)` velocities `b ...`, usually one network call."""

ScaleFn = Callable[[float], float]
"""Guidance scale by sigma in [0, 1]."""

Combine = Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor]
"""`(conditional, unconditional, x, sigma, scale) -> velocity`; shapes `b ...`, sigma `b`."""


def guided(
    conditional: VelocityFn,
    unconditional: VelocityFn,
    scale: float | ScaleFn,
    *,
    interval: tuple[float, float] | None = None,
    combine: Combine | None = None,
) -> VelocityFn:
    """Velocity function under guidance, from one function per branch; see `guided_pair`."""

    def pair(x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        return conditional(x, sigma), unconditional(x, sigma)

    return guided_pair(pair, conditional, scale, interval=interval, combine=combine)


def guided_pair(
    pair: PairFn,
    conditional: VelocityFn,
    scale: float | ScaleFn,
    *,
    interval: tuple[float, float] | None = None,
    combine: Combine | None = None,
) -> VelocityFn:
    """Velocity function under guidance, from a function that gives both branches at once.

    Rules work in the dtype of x. Where the scale is 1, every rule gives the conditional velocity, so only
    `conditional` is called there.

    A scale that depends on sigma, or an interval, reads the first level of each batch: on an accelerator that
    waits for the queue once a call.

    Args:
        pair: gives the conditional and the unconditional velocity.
        conditional: gives the conditional velocity alone.
        scale: guidance scale, or a function of sigma.
        interval: lowest and highest sigma at which the scale holds; elsewhere it is 1.
        combine: the rule, `cfg` by default.

    Raises:
        ConfigError: the scale is not finite, or the interval is not ordered within [0, 1].

    Source: Ho and Salimans 2022, arXiv:2207.12598, eq. 6; interval: Kynkaanniemi et al. 2024,
    arXiv:2404.07724.
    """
    rule = cfg if combine is None else combine
    if not callable(scale) and not math.isfinite(scale):
        raise ConfigError(f"guidance scale must be finite, got {scale}; 1 switches guidance off")
    if interval is not None and not 0 <= interval[0] <= interval[1] <= 1:
        raise ConfigError(f"guidance interval must be two rising levels within [0, 1], got {interval}")

    def current_scale(sigma: Tensor) -> float:
        if interval is None and not callable(scale):
            return scale
        level = float(sigma[0])
        if interval is not None and not interval[0] <= level <= interval[1]:
            return 1.0
        return scale(level) if callable(scale) else scale

    def velocity(x: Tensor, sigma: Tensor) -> Tensor:
        weight = current_scale(sigma)
        if weight == 1:
            return conditional(x, sigma)
        with_condition, without = pair(x, sigma)
        return rule(with_condition.to(x.dtype), without.to(x.dtype), x, sigma, weight)

    return velocity


def linear_scale(at_noise: float, at_data: float) -> ScaleFn:
    """Scale that runs straight from its value at sigma 1 to its value at sigma 0."""
    return lambda sigma: at_data + (at_noise - at_data) * sigma


def cosine_scale(at_noise: float, at_data: float) -> ScaleFn:
    """Scale that runs along half a cosine wave, flat at both ends, from sigma 1 to sigma 0."""
    return lambda sigma: at_data + (at_noise - at_data) * (1 - math.cos(math.pi * sigma)) / 2


def cfg(conditional: Tensor, unconditional: Tensor, _x: Tensor, _sigma: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance: `unconditional + scale * (conditional - unconditional)`. Shapes: `b ...`."""
    return torch.lerp(unconditional, conditional, scale)


def cfg_rescale(amount: float) -> Combine:
    """Rule: `cfg`, brought to the spread of the conditional velocity by this amount.

    The standard deviation is unbiased, per sample over all other axes.

    Raises:
        ConfigError: amount outside [0, 1].

    Source: Lin et al. 2023, arXiv:2305.08891, eq. 15 and 16, on the flow velocity.
    """
    if not 0 <= amount <= 1:
        raise ConfigError(f"rescale amount must lie in [0, 1], got {amount}")

    def rule(conditional: Tensor, unconditional: Tensor, x: Tensor, sigma: Tensor, scale: float) -> Tensor:
        plain = cfg(conditional, unconditional, x, sigma, scale)
        spread = _per_sample(conditional, torch.std)
        plain_spread = _per_sample(plain, torch.std).clamp_min(torch.finfo(plain.dtype).tiny)
        return plain * (amount * spread / plain_spread + (1 - amount))

    return rule


def cfg_zero_star(
    conditional: Tensor, unconditional: Tensor, _x: Tensor, _sigma: Tensor, scale: float
) -> Tensor:
    """Rule: `cfg` with the unconditional velocity scaled to the conditional one. Shapes: `b ...`.

    Usually together with `schedule.zero_init`. ComfyUI's CFGZeroStar scales the denoised estimate instead.

    Source: Fan et al. 2025, arXiv:2503.18886.
    """
    alpha = zero_star_alpha(conditional, unconditional).reshape(-1, *[1] * (conditional.ndim - 1))
    return torch.lerp(alpha * unconditional, conditional, scale)


def zero_star_alpha(conditional: Tensor, unconditional: Tensor) -> Tensor:
    """Factor that brings the unconditional velocity nearest to the conditional one; `b ...` to `b`."""
    product = (conditional * unconditional).flatten(1).sum(1)
    return product / (unconditional.square().flatten(1).sum(1) + 1e-8)


@dataclass(slots=True)
class ApgMomentum:
    """Running difference of one sampling run, `b ...`; make a new one for every run."""

    average: Tensor | None = None


def apg(
    momentum: ApgMomentum,
    *,
    parallel: float = 0.0,
    norm_limit: float = 0.0,
    momentum_factor: float = 0.0,
) -> Combine:
    """Rule: adaptive projected guidance, on the denoised estimates, converted back to a velocity.

    With parallel 1, norm_limit 0 and momentum_factor 0 it equals `cfg` at the same scale. ComfyUI's APG node
    at a scale equals this rule at that scale plus 1. At sigma 0 it gives the conditional velocity.

    Args:
        momentum: state of this sampling run; every call moves it.
        parallel: share kept of the part of the difference that is parallel to the conditional estimate.
        norm_limit: largest norm of the difference per sample; 0 sets none.
        momentum_factor: weight of the earlier differences, negative in the paper.

    Raises:
        ConfigError: norm_limit below 0, or momentum_factor outside [-1, 1].

    Source: Sadat et al. 2024, arXiv:2410.02416, Alg. 1.
    """
    if not norm_limit >= 0:
        raise ConfigError(f"norm_limit must be 0 (none) or above, got {norm_limit}")
    if not -1 <= momentum_factor <= 1:
        raise ConfigError(f"momentum_factor must lie in [-1, 1], got {momentum_factor}")

    def rule(conditional: Tensor, unconditional: Tensor, x: Tensor, sigma: Tensor, scale: float) -> Tensor:
        level = sigma_like(sigma, x)
        difference = level * (unconditional - conditional)
        if momentum.average is not None:
            difference = difference + momentum_factor * momentum.average
        momentum.average = difference
        if norm_limit > 0:
            norm = _per_sample(difference, torch.linalg.vector_norm)
            difference = difference * (norm_limit / norm.clamp_min(norm_limit))
        along = _project(difference, x - level * conditional)
        change = difference - along + parallel * along
        step = torch.where(level > 0, change / level, 0.0)
        return (conditional - (scale - 1) * step).to(conditional.dtype)

    return rule


def _project(vector: Tensor, onto: Tensor) -> Tensor:
    """Part of vector parallel to `onto`, per sample; 0 where `onto` is 0. Shapes: `b ...`."""
    shape = (-1, *[1] * (vector.ndim - 1))
    length = onto.square().flatten(1).sum(1).clamp_min(torch.finfo(onto.dtype).tiny).reshape(shape)
    return (vector * onto).flatten(1).sum(1).reshape(shape) / length * onto


def _per_sample(x: Tensor, measure: Callable[..., Tensor]) -> Tensor:
    """A measure over all axes but the batch, as `b 1 1 ...`."""
    return measure(x, dim=tuple(range(1, x.ndim)), keepdim=True)
