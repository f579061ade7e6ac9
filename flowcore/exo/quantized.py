"""A trunk in fewer bits: the matrices of its decoder layers in 8 or 4, the rest as it is.

8 bits are plain torch; 4 bits are bitsandbytes' NF4, imported when they are asked for.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..errors import ConfigError

QUANTIZED = ("int8", "nf4")


class Int8Linear(nn.Module):
    """A linear layer whose weights are whole numbers of 8 bits, with a scale for each row.

    They are buffers, so that a change of the model's dtype leaves them as they are.
    """

    weight: Tensor
    scale: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        """Take over a layer, rounded to the nearest of 255 steps between a row's extremes."""
        super().__init__()
        with torch.no_grad():
            full = linear.weight.float()
            scale = full.abs().amax(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny) / 127
            self.register_buffer("weight", (full / scale).round().to(torch.int8))
            self.register_buffer("scale", scale[:, 0])
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """Return `b n m` in the dtype of x `b n d`."""
        product = functional.linear(x, self.weight.to(x.dtype)) * self.scale.to(x.dtype)
        return product if self.bias is None else product + self.bias


def quantize(trunk: nn.Module, kind: str) -> None:
    """Replace the linear layers of a trunk's decoder, one after the other, where they are.

    kind: a name of `QUANTIZED`. NF4 weights become 4 bits when they are moved to an accelerator.
    Raises: ConfigError for another kind, or without the package that it needs.
    """
    if kind not in QUANTIZED:
        raise ConfigError(f"quantized weights must be one of {', '.join(QUANTIZED)}, got {kind!r}")
    make: Any = Int8Linear if kind == "int8" else _nf4_maker()
    layers = cast("nn.ModuleList", trunk.get_submodule("language_model.layers"))
    for layer in layers:
        for name, module in list(layer.named_modules()):
            if isinstance(module, nn.Linear):
                layer.set_submodule(name, make(module))


def _nf4_maker() -> Any:  # noqa: ANN401 - a function of layers of a library without types
    try:
        from bitsandbytes.nn import Linear4bit, Params4bit
    except ImportError as err:
        raise ConfigError(
            "trunk weights of nf4 need the package bitsandbytes, got none; run: pip install bitsandbytes, or "
            "take int8, which needs none"
        ) from err

    def make(linear: nn.Linear) -> nn.Module:
        made: nn.Module = Linear4bit(
            linear.in_features,
            linear.out_features,
            bias=linear.bias is not None,
            compute_dtype=linear.weight.dtype,
            quant_type="nf4",
            device="meta",
        )
        made.weight = Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4", module=made)
        made.bias = linear.bias
        return made

    return make
