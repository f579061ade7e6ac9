"""Layers that round their weights and inputs to a dtype and compute exactly otherwise."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from flowcore.ops import Ops


def rounding_ops(dtype: torch.dtype) -> Ops:
    """The constructors of a model whose matrices round to the dtype; what it keeps in float32 stays."""
    linear = partial(RoundedLinear, rounding=dtype)
    return Ops(linear=linear, wide_linear=linear, conv2d=partial(RoundedConv2d, rounding=dtype))


class _Rounded(nn.Module):
    """Rounds weights when they are loaded, and weights and inputs at use: a merged LoRA is rounded anew."""

    bias: Tensor | None

    def __init__(self, *args: Any, rounding: torch.dtype, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.rounding = rounding

    def rounded(self, x: Tensor) -> Tensor:
        return x.to(self.rounding).float()

    @property
    def rounded_bias(self) -> Tensor | None:
        return None if self.bias is None else self.rounded(self.bias)

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        for parameter in self.parameters(recurse=False):
            parameter.data = self.rounded(parameter.data)


class RoundedLinear(_Rounded, nn.Linear):
    """A linear layer in float32 arithmetic on rounded numbers."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(self.rounded(x), self.rounded(self.weight), self.rounded_bias)


class RoundedConv2d(_Rounded, nn.Conv2d):
    """A convolution in float32 arithmetic on rounded numbers."""

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(self.rounded(x), self.rounded(self.weight), self.rounded_bias)
