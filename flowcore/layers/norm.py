"""Normalisation; statistics and weights in float32."""

import torch
from torch import Tensor, nn
from torch.nn import functional


def rms_norm(x: Tensor, eps: float, weight: Tensor | None = None) -> Tensor:
    """Return x / sqrt(mean(x^2) + eps) over the last axis, times weight, float32 whatever the dtype of x."""
    return functional.rms_norm(x.float(), (x.shape[-1],), weight, eps)


def at_use(parameter: Tensor, like: Tensor) -> Tensor:
    """Return the parameter in float32 beside the input: a host may hold it on another device."""
    return parameter.to(device=like.device, dtype=torch.float32)


class RMSNorm(nn.Module):
    """Division by the root mean square, then a weight per channel."""

    def __init__(self, dim: int, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim, device=device))

    def weight_at(self, x: Tensor) -> Tensor:
        """Return the weight in float32 beside the input; a host may bring one of its own here."""
        return at_use(self.weight, x)

    def forward(self, x: Tensor, scale: Tensor | float = 1.0) -> Tensor:
        """Return the normalised x times scale, float32."""
        return rms_norm(x, eps=1e-6) * (self.weight_at(x) * scale)


class FloatLayerNorm(nn.LayerNorm):
    """Layer norm in float32, its weights too."""

    def forward(self, x: Tensor) -> Tensor:
        """Return `... k` of x `... k`."""
        weight, bias = at_use(self.weight, x), at_use(self.bias, x)
        return functional.layer_norm(x.float(), self.normalized_shape, weight, bias, self.eps)
