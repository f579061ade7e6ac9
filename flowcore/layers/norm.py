"""Normalisation without parameters of its own; statistics in float32."""

from torch import Tensor
from torch.nn import functional


def rms_norm(x: Tensor, eps: float, weight: Tensor | None = None) -> Tensor:
    """Return x / sqrt(mean(x^2) + eps) over the last axis, times weight, float32 whatever the dtype of x."""
    return functional.rms_norm(x.float(), (x.shape[-1],), weight, eps)
