"""The attention product over heads, one signature whatever computes it."""

from collections.abc import Callable, Mapping
from typing import TypeAlias

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional

from ..errors import ConfigError
from . import flash

AttentionFn: TypeAlias = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
"""(q, k, v, bias) -> result: q `b nh n e`; k, v `b nh m e`; bias broadcastable to `b nh n m`, additive or a
boolean keep mask; result `b n (nh e)`."""


def automatic(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return the attention by flash-attn where it is installed and fits, else by `sdpa`; shapes as there.

    Compiled graphs keep to `sdpa`, which the compiler knows.
    """
    if torch.compiler.is_compiling() or flash.unfit(q, bias) is not None:
        return sdpa(q, k, v, bias)
    kernels = flash.find_kernels()
    return sdpa(q, k, v, bias) if isinstance(kernels, str) else flash.flash(q, k, v, bias, kernels)


def flash_attn(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return the attention by flash-attn; shapes as of `sdpa`.

    Raises: ConfigError where it is not installed or does not fit.
    """
    kernels = flash.find_kernels()
    fault = kernels if isinstance(kernels, str) else flash.unfit(q, bias)
    if isinstance(kernels, str) or fault is not None:
        raise ConfigError(f"attention flash must have what it needs: {fault}; use attention auto or sdpa")
    return flash.flash(q, k, v, bias, kernels)


def sdpa(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return softmax(q k^T / sqrt(e) + bias) v with heads merged, in the dtype of q.

    Shapes: q `b nh n e`; k, v `b nh m e`; bias broadcastable to `b nh n m`, additive, or boolean with
    True = attend; result `b n (nh e)`. On a CPU half precision is widened, see `widen`.
    """
    return _widened(_product, q, k, v, bias)


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return the attention of each token to those up to itself, as `sdpa`.

    Shapes: q `b nh n e`; k, v `b kv n e`, of whose heads each serves nh/kv of q, uncopied.
    """
    return _widened(_causal_product, q, k, v)


def _widened(product: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, *bias: Tensor | None) -> Tensor:
    if q.device.type != "cpu":
        return product(q, k, v, *bias)
    with torch.autocast("cpu", enabled=False):  # which would take the product back to half precision
        return product(widen(q), widen(k), widen(v), *bias).to(q.dtype)


def widen(x: Tensor) -> Tensor:
    """Return x, on a CPU in float32 if it is in half precision: attention is 2.6 times as fast in it there.

    Measured on one core, forward and backward, 4 heads of 32 channels, 88 tokens, against bfloat16.
    """
    is_half = x.dtype in (torch.bfloat16, torch.float16)
    return x.float() if is_half and x.device.type == "cpu" else x


def _product(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    if bias is not None and bias.dtype != torch.bool:
        bias = bias.to(q.dtype)
    mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    return rearrange(mixed, "b nh n e -> b n (nh e)")


def _causal_product(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return rearrange(mixed, "b nh n e -> b n (nh e)")


ATTENTIONS: Mapping[str, AttentionFn] = {"auto": automatic, "sdpa": sdpa, "flash": flash_attn}
"""What computes attention, by the name that users give."""


def find_attention(name: str) -> AttentionFn:
    """Return the attention of a name.

    Raises: ConfigError if it is unknown, or flash-attn is asked for and cannot be had.
    """
    if name not in ATTENTIONS:
        raise ConfigError(f"attention must be one of {', '.join(ATTENTIONS)}, got {name!r}")
    kernels = flash.find_kernels() if name == "flash" else None
    if isinstance(kernels, str):
        raise ConfigError(
            f"attention must be one that is here, got flash: {kernels}; pip install flash-attn, or use auto"
        )
    return ATTENTIONS[name]
