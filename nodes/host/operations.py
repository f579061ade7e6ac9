"""Give modules built elsewhere the layer classes of ComfyUI, which cast and offload their weights at use."""

from collections.abc import Mapping
from typing import Any

import comfy.ops
import torch
from torch import Tensor, nn

from ...flowcore.layers.norm import RMSNorm
from ...flowcore.ops import Ops

_NAMES = ("Linear", "Conv2d", "GroupNorm", "LayerNorm", "Embedding")


class FloatLinear(comfy.ops.manual_cast.Linear):
    """ComfyUI's layer, computing in float32 whatever the dtype of its input and of its weights."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float())


class FloatConv2d(comfy.ops.manual_cast.Conv2d):
    """ComfyUI's convolution, likewise."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float())


class CastRMSNorm(RMSNorm, comfy.ops.CastWeightBiasOp):
    """flowcore's norm with its weight brought to the input, and patched by a LoRA, at use."""

    comfy_cast_weights = True
    weight_function: list[Any] = []  # noqa: RUF012 - ComfyUI's contract: class attributes
    bias_function: list[Any] = []  # noqa: RUF012

    def weight_at(self, x: Tensor) -> Tensor:
        weight, _ = comfy.ops.cast_bias_weight(self, x, dtype=torch.float32)
        return weight


def to_ops(operations: type[comfy.ops.disable_weight_init]) -> Ops:
    """Return the constructors that flowcore's models take, out of a namespace of ComfyUI's layers."""
    return Ops(
        linear=operations.Linear,
        wide_linear=operations.Linear,
        float_linear=FloatLinear,
        conv2d=operations.Conv2d,
        float_conv2d=FloatConv2d,
        layer_norm=operations.LayerNorm,
        embedding=operations.Embedding,
    )


def use_operations(
    module: nn.Module,
    operations: type[comfy.ops.disable_weight_init],
    special: Mapping[type[nn.Module], type[nn.Module]] | None = None,
) -> nn.Module:
    """Change the classes of all plain torch layers in the module to ComfyUI's, in place, and return it.

    Args:
        module: a network of another library.
        operations: ComfyUI's namespace of layers.
        special: further classes to change, to what; each keeps the attributes of the class it replaces.
    """
    changes = {getattr(nn, name): getattr(operations, name) for name in _NAMES} | dict(special or {})
    for layer in module.modules():
        changed = changes.get(type(layer))
        if changed is None:
            continue
        layer.__class__ = changed
        if not hasattr(layer, "bias"):
            layer.bias = None  # ComfyUI's cast reads it in every layer
    return module


def own_memory(module: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Copy all weights out of the mapped file, so that replacing the file cannot reach a loaded model.

    Args:
        module: changed in place and returned.
        dtype: of the copies, None = as they are. Buffers stay: rotary tables need their float32.
    """
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.data = parameter.data.to(dtype=dtype, copy=True)
    return module
