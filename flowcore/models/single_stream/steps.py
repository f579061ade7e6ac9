"""The blocks' elementwise steps, in float32.

Where no gradient is kept they write to tensors that were made for them, as each function says: on a CPU fresh
memory for a tensor of this size takes longer than the arithmetic.
"""

import torch
from torch import Tensor

from ...layers.norm import RMSNorm, rms_norm
from .positions import HalfRotation, rotate_halves

_EPS = 1e-6


def modulated(x: Tensor, norm: RMSNorm, scale: Tensor, shift: Tensor) -> Tensor:
    """Return norm(x) * (1 + scale) + shift for x `b n d`, scale and shift `b 1 d`."""
    weight = norm.weight_at(x) * (1 + scale)
    if torch.is_grad_enabled():
        return torch.addcmul(shift, rms_norm(x, _EPS), weight)
    return (x * _inverse_length(x)).mul_(weight).add_(shift)


def turned(x: Tensor, norm: RMSNorm, rotation: HalfRotation | None) -> Tensor:
    """Return queries or keys `b n nh e`, normed and turned. x is given up."""
    weight = norm.weight_at(x)
    if torch.is_grad_enabled():
        x = rms_norm(x, _EPS, weight)
        return x if rotation is None else rotate_halves(x, rotation)
    x = x.float()
    x.mul_(_inverse_length(x)).mul_(weight)
    if rotation is None:
        return x
    others = x.roll(x.shape[-1] // 2, dims=-1)
    return x.mul_(rotation.cos).addcmul_(others, rotation.sin)


def gated_sum(x: Tensor, gate: Tensor, branch: Tensor) -> Tensor:
    """Return x + gate * branch for x and branch `b n d`, gate `b 1 d`. The branch is given up."""
    if torch.is_grad_enabled() or branch.dtype != x.dtype:
        return torch.addcmul(x, gate, branch)
    return branch.mul_(gate).add_(x)


def add_to_last(x: Tensor, update: Tensor) -> Tensor:
    """Return x `b l d` with update `b n d` added to its last n tokens, in the wider dtype. x is given up."""
    x = x.to(torch.promote_types(x.dtype, update.dtype))
    start = x.shape[1] - update.shape[1]
    if torch.is_grad_enabled():
        return x + update if not start else torch.cat((x[:, :start], x[:, start:] + update), dim=1)
    x[:, start:] += update
    return x


def _inverse_length(x: Tensor) -> Tensor:
    """Return 1 / sqrt(mean(x^2) + eps) over the last axis of x, which is float32."""
    square: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square()
    return (square / x.shape[-1] + _EPS).rsqrt()
