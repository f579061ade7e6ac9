"""Give modules built elsewhere the layer classes of ComfyUI, which cast and offload their weights at use."""

from collections.abc import Mapping

import comfy.ops
import torch
from torch import nn

from ...flowcore.ops import Ops

_NAMES = ("Linear", "Conv2d", "GroupNorm", "LayerNorm", "Embedding")


def to_ops(operations: type[comfy.ops.disable_weight_init]) -> Ops:
    """Return the constructors that flowcore's models take, out of a namespace of ComfyUI's layers."""
    return Ops(
        linear=operations.Linear,
        conv2d=operations.Conv2d,
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
