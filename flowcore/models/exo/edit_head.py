"""The head that marks cells of the picture and writes into them."""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...layers.attention import AttentionFn
from ...layers.norm import RMSNorm
from ...ops import Ops, Runtime
from .blocks import CrossAttention, KeysValuesPair, SelfAttention, SwiGLU
from .config import ExoConfig

_MASK_BIAS = -2.0
"""Start of the mask's bias: mostly off."""


class Edit(NamedTuple):
    """What an iteration decides.

    mask `b n` in 0..1, float32; indices of the cells that it selects, `b s`; delta that it writes, `b s k`.
    """

    mask: Tensor
    indices: Tensor
    delta: Tensor

    def write(self, edits: Tensor | None) -> Tensor:
        """Return the edit state `b n k` with this edit added; the deltas count as much as the mask says."""
        amount = self.mask.gather(1, self.indices)[..., None].to(self.delta.dtype) * self.delta
        if edits is None:
            edits = amount.new_zeros(*self.mask.shape, amount.shape[-1])
        return edits.scatter_add(1, self.indices[..., None].expand_as(amount), amount)

    def sparse(self) -> Tensor:
        """Return the mask `b n` with the cells that were not selected at 0."""
        chosen = self.mask.gather(1, self.indices)
        return torch.zeros_like(self.mask).scatter(1, self.indices, chosen)


class Block(nn.Module):
    """Attention among cells, attention to the suffix, feed-forward."""

    def __init__(self, config: ExoConfig, *, ops: Ops, **where: Any) -> None:
        super().__init__()
        dim, head_dim, device = config.edit_dim, config.edit_head_dim, where.get("device")
        self.n1 = RMSNorm(dim, device)
        self.attn = SelfAttention(dim, head_dim, ops=ops, **where)
        self.n2 = RMSNorm(dim, device)
        self.cross = CrossAttention(dim, head_dim, ops=ops, **where)
        self.n3 = RMSNorm(dim, device)
        self.mlp = SwiGLU(dim, ops=ops, **where)

    def forward(self, x: Tensor, context: Tensor, attention: AttentionFn) -> Tensor:
        """Return the cells `b n d` after the block, float32; matrices compute in the dtype of context."""
        dtype = context.dtype
        x = x + self.attn(self.n1(x).to(dtype), attention)
        read: KeysValuesPair = self.cross.read(context)
        x = x + self.cross(self.n2(x).to(dtype), read, attention)
        result: Tensor = x + self.mlp(self.n3(x).to(dtype))
        return result


class EditHead(nn.Module):
    """From the memory and the trunk's states of an iteration to the iteration's edit."""

    def __init__(self, config: ExoConfig, *, ops: Ops, **where: Any) -> None:
        super().__init__()
        dim, hidden, device = config.edit_dim, config.hidden_size, where.get("device")
        self.fraction = config.edit_fraction
        self.inp = ops.linear(config.memory_dim, dim, **where)
        self.ctx_norm = RMSNorm(hidden, device)
        self.ctx = ops.linear(hidden, dim, **where)
        self.blocks = nn.ModuleList(Block(config, ops=ops, **where) for _ in range(config.edit_depth))
        self.norm = RMSNorm(dim, device)
        self.mask = ops.linear(dim, 1, **where)
        self.delta1 = ops.linear(dim, dim, **where)
        self.delta2 = ops.linear(dim, hidden, **where)
        nn.init.normal_(self.mask.weight, std=0.02)
        nn.init.constant_(self.mask.bias, _MASK_BIAS)
        nn.init.zeros_(self.delta2.weight)
        nn.init.zeros_(self.delta2.bias)

    def forward(self, memory: Tensor, hidden: Tensor, runtime: Runtime) -> Edit:
        """Return the edit for a memory `b n d` and the suffix's states `b s k`, after the trunk's norm."""
        dtype = memory.dtype
        context = self.ctx(self.ctx_norm(hidden).to(dtype))
        x: Tensor = self.inp(memory).float()
        for block in cast("Iterable[Block]", self.blocks):
            x = block(x, context, runtime.attention)
        cells = self.norm(x).to(dtype)
        mask = self.mask(cells)[..., 0].float().sigmoid()
        indices = mask.topk(math.ceil(self.fraction * mask.shape[1]), dim=1).indices
        chosen = cells.gather(1, indices[..., None].expand(-1, -1, cells.shape[-1]))
        delta = self.delta2(functional.gelu(self.delta1(chosen)))
        return Edit(mask=mask, indices=indices, delta=delta)
