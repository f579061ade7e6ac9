"""Embedded Runge-Kutta pairs, Bogacki-Shampine 3(2) and Dormand-Prince 5(4), adaptive or on a given grid."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

import torch
from torch import Tensor

from ..errors import ConfigError, FlowCoreError
from .path import VelocityFn
from .steps import FinalStep, NoiseFn, Run, Step, StepCallback, check_finite, is_full_final

ErrorNorm = Literal["batch", "sample"]
"""Error of a step: root mean square over the whole batch, or the largest of those of its samples."""

SIGMA_FLOOR = 1e-4
"""Level at which an adaptive run that ends at 0 takes its last step, Euler; training draws no lower level."""

_SAFETY, _SHRINK, _GROW = 0.9, 0.2, 10.0


@dataclass(frozen=True, slots=True)
class Tableau:
    """Butcher tableau whose last stage is the first of the next step; `low` has order - 1."""

    order: int
    nodes: tuple[float, ...]
    rows: tuple[tuple[float, ...], ...]
    weights: tuple[float, ...]
    low: tuple[float, ...]


BOGACKI_SHAMPINE: Final = Tableau(
    order=3,
    nodes=(0, 1 / 2, 3 / 4, 1),
    rows=((), (1 / 2,), (0, 3 / 4), (2 / 9, 1 / 3, 4 / 9)),
    weights=(2 / 9, 1 / 3, 4 / 9, 0),
    low=(7 / 24, 1 / 4, 1 / 3, 1 / 8),
)
"""Source: Bogacki and Shampine 1989, Appl. Math. Lett. 2, 321-325."""

DORMAND_PRINCE: Final = Tableau(
    order=5,
    nodes=(0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1, 1),
    rows=(
        (),
        (1 / 5,),
        (3 / 40, 9 / 40),
        (44 / 45, -56 / 15, 32 / 9),
        (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
        (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
        (35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
    ),
    weights=(35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84, 0),
    low=(5179 / 57600, 0, 7571 / 16695, 393 / 640, -92097 / 339200, 187 / 2100, 1 / 40),
)
"""Source: Dormand and Prince 1980, J. Comput. Appl. Math. 6, 19-26."""


def bosh3(
    velocity: VelocityFn,
    x: Tensor,
    sigmas: Tensor,
    *,
    callback: StepCallback | None = None,
    noise: NoiseFn | None = None,
    rtol: float = 1e-3,
    atol: float = 1e-4,
    error_norm: ErrorNorm = "batch",
    final_step: FinalStep = "euler",
    max_calls: int = 1000,
) -> Tensor:
    """Adaptive Bogacki-Shampine pair: order 3, three calls a step tried; only the ends of sigmas matter.

    Raises:
        ConfigError: an option is out of range.
        FlowCoreError: max_calls did not suffice, or the velocity is not finite.
    """
    run = Run(velocity, x, sigmas, callback, noise)
    control = _Control(rtol, atol, error_norm, is_full_final(final_step), max_calls)
    return _integrate(BOGACKI_SHAMPINE, run, control)


def dopri5(
    velocity: VelocityFn,
    x: Tensor,
    sigmas: Tensor,
    *,
    callback: StepCallback | None = None,
    noise: NoiseFn | None = None,
    rtol: float = 1e-3,
    atol: float = 1e-4,
    error_norm: ErrorNorm = "batch",
    final_step: FinalStep = "euler",
    max_calls: int = 1000,
) -> Tensor:
    """Adaptive Dormand-Prince pair: order 5, six calls a step tried; only the ends of sigmas matter.

    Raises:
        ConfigError: an option is out of range.
        FlowCoreError: max_calls did not suffice, or the velocity is not finite.
    """
    run = Run(velocity, x, sigmas, callback, noise)
    control = _Control(rtol, atol, error_norm, is_full_final(final_step), max_calls)
    return _integrate(DORMAND_PRINCE, run, control)


def bosh3_fixed(
    velocity: VelocityFn,
    x: Tensor,
    sigmas: Tensor,
    *,
    callback: StepCallback | None = None,
    noise: NoiseFn | None = None,
) -> Tensor:
    """Bogacki-Shampine rule on the caller's grid: order 3, three calls a step, none of them at its end."""
    return _fixed(BOGACKI_SHAMPINE, Run(velocity, x, sigmas, callback, noise), is_full=True)


def dopri5_fixed(
    velocity: VelocityFn,
    x: Tensor,
    sigmas: Tensor,
    *,
    callback: StepCallback | None = None,
    noise: NoiseFn | None = None,
    final_step: FinalStep = "euler",
) -> Tensor:
    """Dormand-Prince rule on the caller's grid: order 5, six calls a step."""
    run = Run(velocity, x, sigmas, callback, noise)
    return _fixed(DORMAND_PRINCE, run, is_full=is_full_final(final_step))


@dataclass(frozen=True, slots=True)
class _Control:
    """Options of the step control."""

    rtol: float
    atol: float
    error_norm: ErrorNorm
    is_full: bool
    max_calls: int

    def __post_init__(self) -> None:
        for name, value in (("rtol", self.rtol), ("atol", self.atol)):
            if not 0 < value < 1:
                raise ConfigError(f"{name} must lie between 0 and 1, got {value}")
        if self.error_norm not in ("batch", "sample"):
            raise ConfigError(f"error_norm must be batch or sample, got {self.error_norm!r}")

    def error(self, difference: Tensor, x: Tensor, new: Tensor) -> float:
        """Size of the difference of the pair in units of the tolerance; waits for the accelerator."""
        scaled = difference / (self.atol + self.rtol * torch.maximum(x.abs(), new.abs()))
        squares = scaled.square()
        mean = squares.mean() if self.error_norm == "batch" else squares.flatten(1).mean(1).max()
        return float(mean.sqrt())


def _fixed(tableau: Tableau, run: Run, *, is_full: bool) -> Tensor:
    x = run.start
    used = tableau.weights[:-1]
    for step in run:
        first = run.first_velocity(x, step)
        if step.end == 0 and not is_full:
            x = torch.add(x, first, alpha=step.size)
            continue
        slopes = _slopes(tableau, run, x, first, step, len(used))
        x = _combine(x, slopes, used, step.size)
    return run.finish(x)


def _integrate(tableau: Tableau, run: Run, control: _Control) -> Tensor:
    """Accept or repeat steps until the end of the grid; their size follows the error of the pair."""
    x, sigma, end = run.start, run.grid[0], run.grid[-1]
    stop = end if control.is_full or end > 0 else min(SIGMA_FLOOR, sigma)
    direction = 1.0 if end > sigma else -1.0
    size, calls = 0.05, 1
    first = run.velocity(x, sigma)
    run.report(x, first, _interval(run, sigma, end))
    while sigma != stop:
        remaining = abs(stop - sigma)
        size = remaining if size >= remaining * (1 - 1e-12) else size
        step = Step(0, sigma, stop if size == remaining else sigma + direction * size, direction * size)
        calls += len(tableau.nodes) - 1
        if calls > control.max_calls:
            raise FlowCoreError(
                f"adaptive solver must finish within max_calls {control.max_calls}, got to sigma {sigma:g}; "
                "raise max_calls or rtol"
            )
        slopes = _slopes(tableau, run, x, first, step, len(tableau.nodes))
        new = _combine(x, slopes, tableau.weights, step.size)
        gap = tuple(high - low for high, low in zip(tableau.weights, tableau.low, strict=True))
        error = check_finite(
            control.error(_combine(torch.zeros_like(x), slopes, gap, step.size), x, new), sigma
        )
        if error <= 1:
            x, sigma, first = new, step.end, slopes[-1]
            if sigma != end:
                run.report(x, first, _interval(run, sigma, end))
        growth = _GROW if error == 0 else _SAFETY * error ** (-1 / tableau.order)
        size *= min(max(growth, _SHRINK), _GROW)
    if sigma != end:
        x = torch.add(x, first, alpha=end - sigma)
    return run.finish(x)


def _slopes(tableau: Tableau, run: Run, x: Tensor, first: Tensor, step: Step, count: int) -> list[Tensor]:
    """Velocities of the first `count` stages."""
    slopes = [first]
    for node, row in zip(tableau.nodes[1:count], tableau.rows[1:count], strict=True):
        sigma = step.end if node == 1 else step.start + node * step.size
        slopes.append(run.velocity(_combine(x, slopes, row, step.size), sigma))
    return slopes


def _combine(x: Tensor, slopes: Sequence[Tensor], weights: Sequence[float], size: float) -> Tensor:
    """X plus size times the weighted slopes."""
    for slope, weight in zip(slopes, weights, strict=True):
        if weight != 0:
            x = torch.add(x, slope, alpha=size * weight)
    return x


def _interval(run: Run, sigma: float, end: float) -> Step:
    """Interval of the caller's grid that sigma stands in, for progress reports."""
    passed = sum(abs(level - run.grid[0]) <= abs(sigma - run.grid[0]) for level in run.grid)
    index = min(passed, run.num_steps) - 1
    return Step(index, sigma, run.grid[index + 1] if index + 1 < run.num_steps else end, 0.0)
