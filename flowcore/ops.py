"""What a host may replace: the layer classes a model is built from, and the work done in each call.

A model takes `Ops` when it is built (a host brings layers that cast or offload their weights) and `Runtime`
when it is called (a host brings its attention product, and may wrap or replace whole blocks).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from .layers.attention import AttentionFn, automatic

BlockFn: TypeAlias = Callable[..., Tensor]
RunBlockFn: TypeAlias = Callable[[str, int, BlockFn, Tensor], Tensor]
"""(kind, index, block, x) -> x: `block(x)` computes one block; index counts the blocks of a kind from 0."""


def run_plain(kind: str, index: int, block: BlockFn, x: Tensor) -> Tensor:  # noqa: ARG001 - the hook's signature
    """Return block(x): the default of `Runtime.run_block`."""
    return block(x)


def run_checkpointed(kind: str, index: int, block: BlockFn, x: Tensor) -> Tensor:  # noqa: ARG001 - as above
    """Return block(x), keeping none of its intermediate tensors: the backward pass computes them again."""
    result: Tensor = checkpoint(block, x, use_reentrant=False)
    return result


class WideLinear(nn.Linear):
    """Linear layer that a CPU computes in float32 if its weights are in half precision.

    Then the rounding of the weights is the only error. In float16, which few CPUs can multiply, that is five
    times as fast, measured at 1152 x 512 x 1536 on one core; bfloat16 takes as long as float32.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return `... m` of x `... n`, in the dtype of both; float32 in the case above."""
        is_half = self.weight.dtype in (torch.float16, torch.bfloat16)
        return _float_linear(self, x) if is_half and self.weight.device.type == "cpu" else super().forward(x)


class FloatLinear(nn.Linear):
    """Linear layer that computes in float32 whatever the dtype of its input, and of a file's weights."""

    def forward(self, x: Tensor) -> Tensor:
        """Return `... m`, float32, of x `... n`; autocast is for the caller to switch off."""
        return _float_linear(self, x)


def _float_linear(layer: nn.Linear, x: Tensor) -> Tensor:
    bias = None if layer.bias is None else layer.bias.float()
    return functional.linear(x.float(), layer.weight.float(), bias)


class FloatConv2d(nn.Conv2d):
    """Convolution that computes in float32 whatever the dtype of its input, and of a file's weights."""

    def forward(self, x: Tensor) -> Tensor:
        """Return `b k h w`, float32, of x `b c h w`."""
        bias = None if self.bias is None else self.bias.float()
        result: Tensor = self._conv_forward(x.float(), self.weight.float(), bias)
        return result


@dataclass(frozen=True, slots=True, kw_only=True)
class Ops:
    """Constructors of the layers that own weights. Each takes `device=` and `dtype=` like the torch class.

    Layers of float_linear and float_conv2d must compute in float32; models ask for no dtype of them, as
    weights in half precision would be widened anew in each call. Those of wide_linear may return float32
    for half precision, so they are for models that take either.
    """

    linear: Callable[..., nn.Linear] = nn.Linear
    wide_linear: Callable[..., nn.Linear] = WideLinear
    float_linear: Callable[..., nn.Linear] = FloatLinear
    conv2d: Callable[..., nn.Conv2d] = nn.Conv2d
    float_conv2d: Callable[..., nn.Conv2d] = FloatConv2d
    layer_norm: Callable[..., nn.LayerNorm] = nn.LayerNorm
    embedding: Callable[..., nn.Embedding] = nn.Embedding


@dataclass(frozen=True, slots=True, kw_only=True)
class Runtime:
    """What a host may replace in one call of a model's forward."""

    attention: AttentionFn = automatic
    run_block: RunBlockFn = run_plain


TORCH_OPS = Ops()
DEFAULT_RUNTIME = Runtime()
