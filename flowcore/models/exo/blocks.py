"""Layers that the adapters and both heads of Exo are made of.

Norms and the streams of the heads are float32 whatever the matrices compute in; norms' weights are, too.
"""

import math
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from ...layers.attention import AttentionFn
from ...layers.embeddings import sinusoidal
from ...layers.norm import RMSNorm
from ...layers.rope import Rotation, rotate_pairs
from ...ops import Ops

_TIME_FEATURES = 256


class KeysValuesPair(NamedTuple):
    """Keys and values of a context, `b nh m e`."""

    keys: Tensor
    values: Tensor


class TimeMLP(nn.Module):
    """A vector for a time in [0, 1]."""

    def __init__(self, hidden: int, dim: int, *, ops: Ops, **where: Any) -> None:
        super().__init__()
        self.fc1 = ops.linear(_TIME_FEATURES, hidden, **where)
        self.fc2 = ops.linear(hidden, dim, **where)

    def forward(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        """Return `b d` in dtype for times `b`."""
        features = sinusoidal(1000 * t.float(), _TIME_FEATURES).to(dtype)
        result: Tensor = self.fc2(functional.silu(self.fc1(features)))
        return result


class SwiGLU(nn.Module):
    """Gated feed-forward; the hidden width is 8/3 of the width, rounded up to a multiple of 64."""

    def __init__(self, dim: int, *, ops: Ops, **where: Any) -> None:
        super().__init__()
        hidden = 64 * math.ceil(8 * dim / 3 / 64)
        self.w12 = ops.linear(dim, 2 * hidden, bias=False, **where)
        self.w3 = ops.linear(hidden, dim, bias=False, **where)

    def forward(self, x: Tensor) -> Tensor:
        """Return `b n d`."""
        gate, value = self.w12(x).chunk(2, dim=-1)
        result: Tensor = self.w3(functional.silu(gate) * value)
        return result


class SelfAttention(nn.Module):
    """Attention among tokens, with normed queries and keys."""

    def __init__(self, dim: int, head_dim: int, *, ops: Ops, **where: Any) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.qkv = ops.linear(dim, 3 * dim, bias=False, **where)
        self.o = ops.linear(dim, dim, bias=False, **where)
        self.q_norm = RMSNorm(head_dim, where.get("device"))
        self.k_norm = RMSNorm(head_dim, where.get("device"))

    def forward(self, x: Tensor, attention: AttentionFn, turn: Rotation | None = None) -> Tensor:
        """Return `b n d`; turn: of the tokens' queries and keys."""
        q, k, v = rearrange(self.qkv(x), "b n (three nh e) -> three b nh n e", three=3, e=self.head_dim)
        q, k = self.q_norm(q), self.k_norm(k)
        if turn is not None:
            q, k = rotate_pairs(q, turn), rotate_pairs(k, turn)
        result: Tensor = self.o(attention(q.to(v.dtype), k.to(v.dtype), v, None))
        return result


class CrossAttention(nn.Module):
    """Attention of tokens to a context, with normed queries and keys."""

    def __init__(
        self,
        dim: int,
        head_dim: int,
        *,
        ops: Ops,
        context_dim: int | None = None,
        inner_dim: int | None = None,
        **where: Any,
    ) -> None:
        super().__init__()
        self.head_dim = head_dim
        inner, context = inner_dim or dim, context_dim or dim
        self.q = ops.linear(dim, inner, bias=False, **where)
        self.k = ops.linear(context, inner, bias=False, **where)
        self.v = ops.linear(context, inner, bias=False, **where)
        self.o = ops.linear(inner, dim, bias=False, **where)
        self.q_norm = RMSNorm(head_dim, where.get("device"))
        self.k_norm = RMSNorm(head_dim, where.get("device"))

    def read(self, context: Tensor) -> KeysValuesPair:
        """Return the keys and values of a context `b m k`."""
        values = self._heads(self.v(context))
        return KeysValuesPair(self.k_norm(self._heads(self.k(context))).to(values.dtype), values)

    def forward(
        self, x: Tensor, read: KeysValuesPair, attention: AttentionFn, keep: Tensor | None = None
    ) -> Tensor:
        """Return `b n d`; keep: which part of the context is there, broadcastable to `b 1 n m`."""
        q = self.q_norm(self._heads(self.q(x))).to(read.values.dtype)
        result: Tensor = self.o(attention(q, read.keys, read.values, keep))
        return result

    def _heads(self, x: Tensor) -> Tensor:
        return rearrange(x, "b n (nh e) -> b nh n e", e=self.head_dim)


def layer_norm(x: Tensor) -> Tensor:
    """Return x normed over its last axis without weights, float32."""
    return functional.layer_norm(x.float(), x.shape[-1:], eps=1e-6)
