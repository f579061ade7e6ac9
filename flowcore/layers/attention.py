"""Attention over heads: the default product, and masks in the form it takes."""

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional


def sdpa(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return softmax(q k^T / sqrt(e) + bias) v with heads merged, in the dtype of q.

    Shapes: q `b nh n e`; k, v `b nh m e`; bias broadcastable to `b nh n m`, additive, or boolean with
    True = attend; result `b n (nh e)`.
    On a CPU a bfloat16 product runs in float32, where torch has the faster kernel (its backward pass takes a
    quarter of the time), under autocast too.
    """
    dtype = q.dtype
    if dtype == torch.bfloat16 and q.device.type == "cpu":
        with torch.autocast("cpu", enabled=False):
            return _product(q.float(), k.float(), v.float(), bias).to(dtype)
    return _product(q, k, v, bias)


def _product(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    if bias is not None and bias.dtype != torch.bool:
        bias = bias.to(q.dtype)
    mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    return rearrange(mixed, "b nh n e -> b n (nh e)")


def keep_mask_to_bias(keep: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the additive form of a boolean keep mask: 0 where True, -inf where False."""
    return torch.zeros_like(keep, dtype=dtype).masked_fill(~keep, -torch.inf)
