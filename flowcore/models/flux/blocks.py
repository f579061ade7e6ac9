"""The parts of Flux: embedder, norms, modulation, the blocks of two streams and of one, and the last layer.

Parameters carry the names of the published checkpoints. A block takes and returns the joint sequence `b l d`,
condition tokens first. It is float32 whatever the matrices compute in, and so are norms, modulations and
rotations: the residual of FLUX.1 leaves the range of float16.
Source: black-forest-labs/flux, modules/layers.py; Souymodip/flux_core, layers.py.
"""

from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from ...layers.attention import AttentionFn, widen
from ...layers.modulation import Modulation
from ...layers.norm import rms_norm
from ...layers.rope import Rotation, rotate_pairs
from ...ops import Ops
from .config import FluxConfig

EPS = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class Signals:
    """What steers the blocks, the same for all of them. Matrices compute in the dtype of condition.

    Shapes: condition `b 1 d`, silu of the vector that modulations are made from; rotation of `b 1 l (e/2)`
    pairs; bias broadcastable to `b nh l l`; num_text = m, the condition tokens that begin the sequence.
    """

    condition: Tensor
    rotation: Rotation
    bias: Tensor | None
    num_text: int


class MLPEmbedder(nn.Module):
    """Two layers with a SiLU between: a vector of any width to one of the model's."""

    def __init__(self, in_dim: int, hidden_dim: int, *, ops: Ops, **where: Any) -> None:
        super().__init__()
        self.in_layer = ops.linear(in_dim, hidden_dim, **where)
        self.out_layer = ops.linear(hidden_dim, hidden_dim, **where)

    def forward(self, x: Tensor) -> Tensor:
        """Return `b d` of x `b k`."""
        vector: Tensor = self.out_layer(functional.silu(self.in_layer(x)))
        return vector


class RMSNorm(nn.Module):
    """Division by the root mean square of a head, then a scale per channel, kept in float32."""

    def __init__(self, dim: int, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(dim, device=device))

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalised x, float32."""
        return rms_norm(x, EPS, self.scale.to(device=x.device, dtype=torch.float32))


class QKNorm(nn.Module):
    """The norms of queries and keys."""

    def __init__(self, dim: int, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.query_norm = RMSNorm(dim, device)
        self.key_norm = RMSNorm(dim, device)

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Return both normalised, float32, for the rotation that follows."""
        return self.query_norm(q), self.key_norm(k)


class ModulationHead(nn.Module):
    """Shift, scale and gate for each of `count` sub-layers."""

    def __init__(self, dim: int, count: int, *, ops: Ops, **where: Any) -> None:
        super().__init__()
        self.count = count
        self.lin = ops.linear(dim, 3 * count * dim, **where)

    def forward(self, condition: Tensor) -> list[Modulation]:
        """Return the modulations of `b 1 d`, float32."""
        parts = self.lin(condition).float().chunk(3 * self.count, dim=-1)
        return [
            Modulation(scale=1 + scale, shift=shift, gate=gate)
            for shift, scale, gate in zip(parts[0::3], parts[1::3], parts[2::3], strict=True)
        ]


def modulated(x: Tensor, by: Modulation, dtype: torch.dtype) -> Tensor:
    """Return LayerNorm(x) * scale + shift in dtype for x `b n d`, computed in float32."""
    normed = functional.layer_norm(x, x.shape[-1:], eps=EPS)
    return torch.addcmul(by.shift, normed, by.scale).to(dtype)


def added(x: Tensor, by: Modulation, branch: Tensor) -> Tensor:
    """Return x + gate * branch, float32; a float16 branch that overflows counts as its largest number."""
    return torch.addcmul(x, by.gate, torch.nan_to_num(branch) if branch.dtype == torch.float16 else branch)


class SelfAttention(nn.Module):
    """One stream's part of a joint attention: its queries, keys and values, and its output projection."""

    def __init__(self, config: FluxConfig, *, ops: Ops, **where: Any) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = ops.linear(config.hidden_size, 3 * config.hidden_size, bias=config.qkv_bias, **where)
        self.norm = QKNorm(config.head_dim, where.get("device"))
        self.proj = ops.linear(config.hidden_size, config.hidden_size, **where)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return q, k (normed, float32) and v (in the dtype of x), each `b nh n e`."""
        q, k, v = split_heads(self.qkv(x), self.num_heads)
        return *self.norm(q, k), v


def split_heads(qkv: Tensor, num_heads: int) -> Tensor:
    """Return q, k and v, stacked as `three b nh n e`, of a projection `b n (three nh e)`."""
    return rearrange(qkv, "b n (three nh e) -> three b nh n e", three=3, nh=num_heads)


def attend(q: Tensor, k: Tensor, v: Tensor, signals: Signals, attention: AttentionFn) -> Tensor:
    """Return the attention of the joint sequence, `b l d`, in the dtype of v; q and k are rotated."""
    wide = widen(v)
    q, k = (rotate_pairs(x, signals.rotation).to(wide.dtype) for x in (q, k))
    return attention(q, k, wide, signals.bias).to(v.dtype)


def joined(mixed: Tensor, hidden: Tensor) -> Tensor:
    """Return `b l (d + m)`: attention `b l d`, then the tanh form of GELU of hidden `b l m`."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return torch.cat((mixed, functional.gelu(hidden, approximate="tanh")), dim=-1)
    # Written where it is to lie: a copy of the model's widest tensor takes a CPU as long as its GELU.
    joint = hidden.new_empty(*hidden.shape[:-1], mixed.shape[-1] + hidden.shape[-1])
    attended, activated = joint.split((mixed.shape[-1], hidden.shape[-1]), dim=-1)
    attended.copy_(mixed)
    torch.ops.aten.gelu.out(hidden, approximate="tanh", out=activated)
    return joint


class DoubleStreamBlock(nn.Module):
    """Condition and data tokens, each with weights of their own, meet in one attention."""

    def __init__(self, config: FluxConfig, *, ops: Ops, **where: Any) -> None:
        super().__init__()
        dim = config.hidden_size

        def mlp() -> nn.Sequential:
            return nn.Sequential(
                ops.linear(dim, config.mlp_dim, **where),
                nn.GELU(approximate="tanh"),
                ops.linear(config.mlp_dim, dim, **where),
            )

        self.img_mod = ModulationHead(dim, 2, ops=ops, **where)
        self.img_attn = SelfAttention(config, ops=ops, **where)
        self.img_mlp = mlp()
        self.txt_mod = ModulationHead(dim, 2, ops=ops, **where)
        self.txt_attn = SelfAttention(config, ops=ops, **where)
        self.txt_mlp = mlp()

    def forward(self, x: Tensor, signals: Signals, attention: AttentionFn) -> Tensor:
        """Return the joint sequence after the block."""
        num_text, dtype = signals.num_text, signals.condition.dtype
        txt, img = x[:, :num_text], x[:, num_text:]
        txt_mod1, txt_mod2 = self.txt_mod(signals.condition)
        img_mod1, img_mod2 = self.img_mod(signals.condition)

        streams = (
            self.txt_attn.heads(modulated(txt, txt_mod1, dtype)),
            self.img_attn.heads(modulated(img, img_mod1, dtype)),
        )
        q, k, v = (torch.cat(parts, dim=2) for parts in zip(*streams, strict=True))  # b nh l e
        mixed = attend(q, k, v, signals, attention)  # b l d

        txt = added(txt, txt_mod1, self.txt_attn.proj(mixed[:, :num_text]))
        txt = added(txt, txt_mod2, self.txt_mlp(modulated(txt, txt_mod2, dtype)))
        img = added(img, img_mod1, self.img_attn.proj(mixed[:, num_text:]))
        img = added(img, img_mod2, self.img_mlp(modulated(img, img_mod2, dtype)))
        return torch.cat((txt, img), dim=1)


class SingleStreamBlock(nn.Module):
    """All tokens with the same weights; attention and feed-forward side by side, in two fused projections."""

    def __init__(self, config: FluxConfig, *, ops: Ops, **where: Any) -> None:
        super().__init__()
        dim = config.hidden_size
        self.num_heads = config.num_heads
        self.widths = (3 * dim, config.mlp_dim)
        self.linear1 = ops.linear(dim, sum(self.widths), **where)
        self.linear2 = ops.linear(dim + config.mlp_dim, dim, **where)
        self.norm = QKNorm(config.head_dim, where.get("device"))
        self.modulation = ModulationHead(dim, 1, ops=ops, **where)

    def forward(self, x: Tensor, signals: Signals, attention: AttentionFn) -> Tensor:
        """Return the joint sequence after the block."""
        (mod,) = self.modulation(signals.condition)
        u = modulated(x, mod, signals.condition.dtype)
        qkv, hidden = self.linear1(u).split(self.widths, dim=-1)
        q, k, v = split_heads(qkv, self.num_heads)
        q, k = self.norm(q, k)
        mixed = attend(q, k, v, signals, attention)
        branch = self.linear2(joined(mixed, hidden))
        return added(x, mod, branch)


class LastLayer(nn.Module):
    """Norm, modulation by the condition, and the projection to the width of an output token."""

    def __init__(self, config: FluxConfig, *, ops: Ops, **where: Any) -> None:
        super().__init__()
        dim = config.hidden_size
        self.linear = ops.linear(dim, config.out_channels, **where)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), ops.linear(dim, 2 * dim, **where))

    def forward(self, x: Tensor, vec: Tensor) -> Tensor:
        """Return `b n k` of x `b n d`; vec `b 1 d`."""
        shift, scale = self.adaLN_modulation(vec).float().chunk(2, dim=-1)
        by = Modulation(scale=1 + scale, shift=shift, gate=torch.ones_like(scale))
        result: Tensor = self.linear(modulated(x, by, vec.dtype))
        return result
