"""Solvers of `dx / dsigma = velocity`, all with the signature `Solver`; options are further keywords.

Every function walks the caller's grid as it is. Levels and coefficients are Python floats, so that a step on
an accelerator waits for nothing. No solver asks the network at sigma 0 unless `final_step="full"` is given.
"""

import math
from collections.abc import Mapping
from typing import Final, Literal

import torch
from torch import Tensor

from ..errors import ConfigError
from .path import VelocityFn
from .runge_kutta import bosh3, bosh3_fixed, dopri5, dopri5_fixed
from .steps import FinalStep, NoiseFn, Run, Solver, StepCallback, check_unit, is_full_final


def euler(
    velocity: VelocityFn,
    x: Tensor,
    sigmas: Tensor,
    *,
    callback: StepCallback | None = None,
    noise: NoiseFn | None = None,
) -> Tensor:
    """Euler steps: order 1, one call a step.

    Source: Karras et al. 2022, arXiv:2206.00364, Alg. 2 without churn.
    """
    run = Run(velocity, x, sigmas, callback, noise)
    x = run.start
    for step in run:
        x = torch.add(x, run.first_velocity(x, step), alpha=step.size)
    return run.finish(x)


def midpoint(
    velocity: VelocityFn,
    x: Tensor,
    sigmas: Tensor,
    *,
    callback: StepCallback | None = None,
    noise: NoiseFn | None = None,
) -> Tensor:
    """Midpoint rule: order 2, two calls a step. On Gaussian data it happens to reach order 3."""
    run = Run(velocity, x, sigmas, callback, noise)
    x = run.start
    for step in run:
        half = step.size / 2
        middle = torch.add(x, run.first_velocity(x, step), alpha=half)
        x = torch.add(x, run.velocity(middle, step.start + half), alpha=step.size)
    return run.finish(x)


def heun(
    velocity: VelocityFn,
    x: Tensor,
    sigmas: Tensor,
    *,
    callback: StepCallback | None = None,
    noise: NoiseFn | None = None,
    final_step: FinalStep = "euler",
) -> Tensor:
    """Heun's trapezoid rule: order 2, two calls a step.

    Source: Karras et al. 2022, arXiv:2206.00364, Alg. 1, whose last step is Euler as well.
    """
    run = Run(velocity, x, sigmas, callback, noise)
    is_full = is_full_final(final_step)
    x = run.start
    for step in run:
        first = run.first_velocity(x, step)
        ahead = torch.add(x, first, alpha=step.size)
        if step.end == 0 and not is_full:
            x = ahead
        else:
            x = torch.add(x, first + run.velocity(ahead, step.end), alpha=step.size / 2)
    return run.finish(x)


def rk4(
    velocity: VelocityFn,
    x: Tensor,
    sigmas: Tensor,
    *,
    callback: StepCallback | None = None,
    noise: NoiseFn | None = None,
    final_step: FinalStep = "euler",
) -> Tensor:
    """Classical Runge-Kutta rule: order 4, four calls a step."""
    run = Run(velocity, x, sigmas, callback, noise)
    is_full = is_full_final(final_step)
    x = run.start
    for step in run:
        size, middle = step.size, step.start + step.size / 2
        k1 = run.first_velocity(x, step)
        if step.end == 0 and not is_full:
            x = torch.add(x, k1, alpha=size)
            continue
        k2 = run.velocity(torch.add(x, k1, alpha=size / 2), middle)
        k3 = run.velocity(torch.add(x, k2, alpha=size / 2), middle)
        k4 = run.velocity(torch.add(x, k3, alpha=size), step.end)
        x = torch.add(x, k1 + 2 * k2 + 2 * k3 + k4, alpha=size / 6)
    return run.finish(x)


def rk4_reference(
    velocity: VelocityFn,
    x: Tensor,
    sigmas: Tensor,
    *,
    callback: StepCallback | None = None,
    noise: NoiseFn | None = None,
) -> Tensor:
    """Runge-Kutta rule whose fourth call is made at the middle of the step, not at its end: order 1.

    For pictures that were made with it; `rk4` is the rule of the books. Not among SOLVERS: it asks for states
    at levels that they do not have, so that a masked run does not keep what it should.

    Source: Particle1904/SingleStreamDiT_T5Gemma2, samplers.py.
    """
    run = Run(velocity, x, sigmas, callback, noise)
    x = run.start
    for step in run:
        size, middle = step.size, step.start + step.size / 2
        k1 = run.first_velocity(x, step)
        k2 = run.velocity(torch.add(x, k1, alpha=size / 2), middle)
        k3 = run.velocity(torch.add(x, k2, alpha=size / 2), middle)
        k4 = run.velocity(torch.add(x, k3, alpha=size), middle)
        x = torch.add(x, k1 + 2 * k2 + 2 * k3 + k4, alpha=size / 6)
    return run.finish(x)


def ab2(
    velocity: VelocityFn,
    x: Tensor,
    sigmas: Tensor,
    *,
    callback: StepCallback | None = None,
    noise: NoiseFn | None = None,
) -> Tensor:
    """Adams-Bashforth rule of two steps with variable size: order 2, one call a step; Euler first."""
    run = Run(velocity, x, sigmas, callback, noise)
    x = run.start
    last: tuple[Tensor, float] | None = None
    for step in run:
        current = run.first_velocity(x, step)
        slope = current
        if last is not None:
            previous, previous_size = last
            slope = torch.lerp(previous, current, 1 + step.size / (2 * previous_size))
        x = torch.add(x, slope, alpha=step.size)
        last = current, step.size
    return run.finish(x)


def ddim(
    velocity: VelocityFn,
    x: Tensor,
    sigmas: Tensor,
    *,
    callback: StepCallback | None = None,
    noise: NoiseFn | None = None,
    eta: float = 0.0,
) -> Tensor:
    """DDIM: order 1, one call a step; eta 0 equals Euler, eta 1 draws from the exact posterior.

    The marginal distribution at each level is kept for every eta in [0, 1].

    Raises:
        ConfigError: eta outside [0, 1], sigmas rise, or eta above 0 without noise.

    Source: Song et al. 2020, arXiv:2010.02502, eq. 12 and 16, with signal weight 1 - sigma and noise weight
    sigma.
    """
    run = Run(velocity, x, sigmas, callback, noise, only_descending=True)
    check_unit("eta", eta)
    x = run.start
    for step in run:
        current = run.first_velocity(x, step)
        denoised = torch.add(x, current, alpha=-step.start)
        if step.end == 0:
            x = denoised
            continue
        spread = eta * _posterior_std(step.start, step.end)
        kept = math.sqrt(max(step.end**2 - spread**2, 0.0))
        estimate = torch.add(x, current, alpha=1 - step.start)
        x = torch.add((1 - step.end) * denoised, estimate, alpha=kept)
        x = run.add_noise(x, step, spread)
    return run.finish(x)


def euler_ancestral(
    velocity: VelocityFn,
    x: Tensor,
    sigmas: Tensor,
    *,
    callback: StepCallback | None = None,
    noise: NoiseFn | None = None,
    eta: float = 1.0,
    noise_scale: float = 1.0,
) -> Tensor:
    """Euler to a level below the next one, then back up with new noise, as ComfyUI does for flow models.

    The noise level differs from that of `ddim` with the same eta.

    Raises:
        ConfigError: eta outside [0, 1], sigmas rise, or eta above 0 without noise.
    """
    run = Run(velocity, x, sigmas, callback, noise, only_descending=True)
    check_unit("eta", eta)
    x = run.start
    for step in run:
        denoised = torch.add(x, run.first_velocity(x, step), alpha=-step.start)
        if step.end == 0:
            x = denoised
            continue
        down = step.end * (1 + (step.end / step.start - 1) * eta)
        growth = (1 - step.end) / (1 - down)
        spread = math.sqrt(max(step.end**2 - (down * growth) ** 2, 0.0)) if eta else 0.0
        x = growth * torch.lerp(denoised, x, down / step.start)
        x = run.add_noise(x, step, noise_scale * spread)
    return run.finish(x)


def dpmpp_2m(
    velocity: VelocityFn,
    x: Tensor,
    sigmas: Tensor,
    *,
    callback: StepCallback | None = None,
    noise: NoiseFn | None = None,
    lambda_kind: Literal["log_t", "logsnr"] = "log_t",
) -> Tensor:
    """DPM-Solver++ of two steps: order 2, one call a step; the first and the last are order 1.

    Args:
        velocity: see Solver.
        x: see Solver.
        sigmas: see Solver.
        callback: see Solver.
        noise: unused.
        lambda_kind: time in which the estimate is extrapolated: `log_t` is `-log(sigma)` (ComfyUI's
            dpmpp_2m), `logsnr` is `log((1 - sigma) / sigma)` (diffusers), infinite at sigma 1, so that the
            second step is order 1 too.

    Raises:
        ConfigError: lambda_kind is unknown, or sigmas rise.

    Source: Lu et al. 2022, arXiv:2211.01095, Alg. 2.
    """
    if lambda_kind not in ("log_t", "logsnr"):
        raise ConfigError(f"lambda_kind must be log_t or logsnr, got {lambda_kind!r}")
    run = Run(velocity, x, sigmas, callback, noise, only_descending=True)
    x = run.start
    last: tuple[Tensor, float] | None = None
    for step in run:
        denoised = torch.add(x, run.first_velocity(x, step), alpha=-step.start)
        if step.end == 0:
            x = denoised
            continue
        size = _lambda(step.end, lambda_kind) - _lambda(step.start, lambda_kind)
        target = denoised
        if last is not None:
            previous, previous_size = last
            target = torch.lerp(previous, denoised, 1 + size / (2 * previous_size))
        x = torch.lerp(target, x, step.end / step.start)
        last = denoised, size
    return run.finish(x)


def _posterior_std(start: float, end: float) -> float:
    """Standard deviation of noised latents at level end, given those at level start and the clean ones."""
    return end / start * math.sqrt(max(start**2 - ((1 - start) / (1 - end) * end) ** 2, 0.0))


def _lambda(sigma: float, kind: str) -> float:
    if kind == "log_t":
        return -math.log(sigma)
    return math.log((1 - sigma) / sigma) if sigma < 1 else -math.inf


SOLVERS: Final[Mapping[str, Solver]] = {
    "euler": euler,
    "midpoint": midpoint,
    "heun": heun,
    "rk4": rk4,
    "ab2": ab2,
    "ddim": ddim,
    "euler_ancestral": euler_ancestral,
    "dpmpp_2m": dpmpp_2m,
    "bosh3": bosh3,
    "bosh3_fixed": bosh3_fixed,
    "dopri5": dopri5,
    "dopri5_fixed": dopri5_fixed,
}
"""Every solver by the name that settings and command lines use."""
