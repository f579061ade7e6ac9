"""Closed-form problems on which solvers are measured, in float64."""

import torch
from torch import Tensor

from flowcore.flow import VelocityFn
from tests.golden.flow import gauss_field, gauss_flow, mixture_field


def row(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


GAUSS = {"gauss_mu": row(1.5, -0.7, 0.2, 3.0), "gauss_s": row(0.5, 0.1, 2.0, 0.8)}
MIXTURE = {"mix_w": row(0.3, 0.7), "mix_m": row(-2, 1), "mix_s": row(0.3, 0.5)}
START = torch.stack([row(0.3, -1.2, 0.8, 1.7), row(-0.5, 0.4, -2.0, 0.1)])

problem_g = gauss_field(GAUSS)
problem_m = mixture_field(MIXTURE)


def solution_g(start: float, end: float) -> Tensor:
    return gauss_flow(GAUSS, START, start, end)


def uniform_grid(num_steps: int, start: float = 0.9, end: float = 0.2) -> Tensor:
    return torch.linspace(start, end, num_steps + 1, dtype=torch.float64)


class Counted:
    """A velocity function that keeps the levels it was asked at."""

    def __init__(self, velocity: VelocityFn) -> None:
        self.velocity = velocity
        self.levels: list[float] = []

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        self.levels.append(float(sigma[0]))
        return self.velocity(x, sigma)


def constant(x: Tensor, _sigma: Tensor) -> Tensor:
    return torch.full_like(x, 0.75)
