"""What every solver shares: the grid on the host, the state in float32 or better, and the reports."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, Protocol

import torch
from torch import Tensor

from ..errors import ConfigError, FlowCoreError, ShapeError
from .path import VelocityFn

NoiseFn = Callable[[int, Tensor], Tensor]
"""`(step, like b ...) -> standard normal numbers b ...` for the solvers that add noise."""


FinalStep = Literal["euler", "full"]
"""What happens in a step that ends at 0: Euler, or the full rule, which asks the network at 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepState:
    """What a callback sees once a step, after the step's first network call and before the state moves.

    Args:
        step: index of the step, from 0. Adaptive solvers give the interval of the caller's grid they stand
            in, so numbers may repeat or be left out, but never fall.
        num_steps: number of intervals of the grid.
        sigma: level of x.
        sigma_next: level that the step leads to.
        x: the state `b ...`.
        velocity: prediction at x.
        denoised: estimate of the clean latents, `x - sigma * velocity`.
    """

    step: int
    num_steps: int
    sigma: float
    sigma_next: float
    x: Tensor
    velocity: Tensor
    denoised: Tensor


StepCallback = Callable[[StepState], None]
"""Receives the state of each step. Its exceptions end the run and reach the caller unchanged."""


class Solver(Protocol):
    """The one signature of all solvers; options beyond it are keywords with defaults.

    Shapes: x and the result `b ...`; sigmas `n + 1` from the level of x to the level wanted. The state is
    kept in float32, or float64 if x has it, and the result is cast back to the dtype of x. The network
    receives the state and its level as `b` numbers of float32 (float64 for a float64 state).
    """

    def __call__(
        self,
        velocity: VelocityFn,
        x: Tensor,
        sigmas: Tensor,
        *,
        callback: StepCallback | None = None,
        noise: NoiseFn | None = None,
    ) -> Tensor:
        """Integrate the velocity from sigmas[0] to sigmas[-1]; deterministic solvers leave `noise` unused."""
        ...


@dataclass(frozen=True, slots=True)
class Step:
    """One interval of the grid: index, level at start and end, and `size = end - start`."""

    index: int
    start: float
    end: float
    size: float


class Run:
    """One pass of a solver over a grid: checks the arguments, then yields the steps and asks the network."""

    def __init__(
        self,
        velocity: VelocityFn,
        x: Tensor,
        sigmas: Tensor,
        callback: StepCallback | None,
        noise: NoiseFn | None,
        *,
        only_descending: bool = False,
    ) -> None:
        self.grid = read_grid(sigmas, only_descending=only_descending)
        if not x.is_floating_point() or x.ndim == 0:
            raise ShapeError(
                f"state must be a floating-point tensor with a batch axis, got {x.dtype} {tuple(x.shape)}"
            )
        self.start = x.to(torch.promote_types(x.dtype, torch.float32))
        self._velocity = velocity
        self._dtype = x.dtype
        self._callback = callback
        self._noise = noise

    @property
    def num_steps(self) -> int:
        """Number of intervals."""
        return len(self.grid) - 1

    def __iter__(self) -> Iterator[Step]:
        """Yield the steps in order."""
        for index, (start, end) in enumerate(pairwise(self.grid)):
            yield Step(index, start, end, end - start)

    def velocity(self, x: Tensor, sigma: float) -> Tensor:
        """Network's velocity at the state x of level sigma, in the dtype of x.

        Raises:
            ShapeError: the velocity function returned another shape.
        """
        levels = torch.full((x.shape[0],), sigma, dtype=x.dtype, device=x.device)
        velocity = self._velocity(x, levels)
        if velocity.shape != x.shape:
            raise ShapeError(
                f"velocity must have the shape of x {tuple(x.shape)}, got {tuple(velocity.shape)}"
            )
        return velocity.to(x.dtype)

    def first_velocity(self, x: Tensor, step: Step) -> Tensor:
        """Velocity at the start of a step, reported to the callback."""
        velocity = self.velocity(x, step.start)
        self.report(x, velocity, step)
        return velocity

    def report(self, x: Tensor, velocity: Tensor, step: Step) -> None:
        """Tell the callback, if there is one, where the run stands."""
        if self._callback is not None:
            self._callback(
                StepState(
                    step=step.index,
                    num_steps=self.num_steps,
                    sigma=step.start,
                    sigma_next=step.end,
                    x=x,
                    velocity=velocity,
                    denoised=torch.add(x, velocity, alpha=-step.start),
                )
            )

    def add_noise(self, x: Tensor, step: Step, scale: float) -> Tensor:
        """X plus scale times the step's noise; nothing is drawn for scale 0.

        Raises:
            ConfigError: no noise function was given.
            ShapeError: the noise function returned another shape.
        """
        if scale == 0:
            return x
        if self._noise is None:
            raise ConfigError(
                "noise must be given to a solver that adds noise, got None; pass generator_noise(...)"
            )
        noise = self._noise(step.index, x)
        if noise.shape != x.shape:
            raise ShapeError(f"noise must have the shape of x {tuple(x.shape)}, got {tuple(noise.shape)}")
        return torch.add(x, noise.to(dtype=x.dtype, device=x.device), alpha=scale)

    def finish(self, x: Tensor) -> Tensor:
        """The result in the dtype in which the state came."""
        return x.to(self._dtype)


def read_grid(sigmas: Tensor, *, only_descending: bool) -> list[float]:
    """The levels as Python numbers; the one transfer from a grid that lies on an accelerator.

    Raises:
        ConfigError: not one axis of at least 2 finite levels in [0, 1], or not strictly monotone.
    """
    if sigmas.ndim != 1 or sigmas.shape[0] < 2:
        raise ConfigError(f"sigmas must be one row of at least 2 levels, got shape {tuple(sigmas.shape)}")
    grid: list[float] = sigmas.to(torch.float64).tolist()
    bad = next((level for level in grid if not 0 <= level <= 1), None)
    if bad is not None:
        raise ConfigError(f"sigmas must lie in [0, 1], got {bad}")
    pairs = list(pairwise(grid))
    if all(start > end for start, end in pairs):
        return grid
    if all(start < end for start, end in pairs) and not only_descending:
        return grid
    direction = "fall" if only_descending else "fall (or rise, for inversion)"
    start, end = next(((start, end) for start, end in pairs if start <= end), pairs[0])
    raise ConfigError(f"sigmas must {direction} at every step, got {start:g} before {end:g}")


def generator_noise(generator: torch.Generator) -> NoiseFn:
    """Noise function that draws float32 normal numbers, one draw for each step that adds noise.

    Drawn on the generator's device, so that a CPU generator gives the same images on every device.
    """

    def noise(_step: int, like: Tensor) -> Tensor:
        drawn = torch.randn(like.shape, generator=generator, device=generator.device, dtype=torch.float32)
        return drawn.to(device=like.device, dtype=like.dtype)

    return noise


def check_unit(name: str, value: float) -> float:
    """The value, if it lies in [0, 1].

    Raises:
        ConfigError: it does not.
    """
    if not 0 <= value <= 1:
        raise ConfigError(f"{name} must lie in [0, 1], got {value}")
    return value


def is_full_final(final_step: str) -> bool:
    """Whether the last step may ask the network at 0.

    Raises:
        ConfigError: the choice is unknown.
    """
    if final_step not in ("euler", "full"):
        raise ConfigError(f"final_step must be euler or full, got {final_step!r}")
    return final_step == "full"


def check_finite(error: float, sigma: float) -> float:
    """The error norm of a step, if it is a number.

    Raises:
        FlowCoreError: the velocity was not finite.
    """
    if not math.isfinite(error):
        raise FlowCoreError(f"velocity must be finite, got NaN or infinity near sigma {sigma:g}")
    return error
