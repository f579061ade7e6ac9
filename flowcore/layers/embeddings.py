"""Embeddings of scalars."""

import math

import torch
from torch import Tensor
from torch.nn import functional


def timestep_frequencies(
    dim: int, device: torch.device | str | None = None, max_period: float = 1e4
) -> Tensor:
    """Return max_period^(-k / (dim/2)) for k = 0 .. dim/2 - 1, float32, shape `1 (dim/2)`."""
    half = dim // 2
    # In this order the values equal those that published models were trained with, bit for bit.
    return torch.exp(-math.log(max_period) * torch.arange(half, dtype=torch.float32, device=device) / half)[
        None
    ]


def sinusoidal(values: Tensor, dim: int) -> Tensor:
    """Return [cos, sin] of values times geometric frequencies, float32; a zero column fills an odd dim.

    Shapes: values `b`, result `b dim`. The caller scales the values (times in [0, 1] usually by 1000).
    Source: Vaswani et al. 2017, arXiv:1706.03762, section 3.5, with cosines first.
    """
    angles = values.float()[:, None] * timestep_frequencies(dim, values.device)
    return functional.pad(torch.cat((angles.cos(), angles.sin()), dim=-1), (0, dim % 2))
