"""The noise of pictures: a row from each picture's own generator, on the CPU, whatever the device."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .flow.steps import NoiseFn


def draw_noise(generators: Sequence[torch.Generator], shape: tuple[int, ...]) -> Tensor:
    """Return standard normal numbers `b ...`, float32, a row from each CPU generator.

    For one picture these are the values of ComfyUI's noise of the same seed.
    """
    return torch.cat([torch.randn((1, *shape), generator=generator) for generator in generators])


def step_noise(generators: Sequence[torch.Generator]) -> NoiseFn:
    """Return the noise of stochastic solvers: each row goes on with its own generator."""

    def noise(_step: int, like: Tensor) -> Tensor:
        return draw_noise(generators, tuple(like.shape[1:])).to(like)

    return noise
