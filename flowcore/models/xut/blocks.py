"""The parts of XUT: embedders, norms, attentions, and the block made of them.

Parameters carry the names of the published checkpoints. The stream, the norms, the modulations and the
rotations are float32 whatever the blocks' matrices compute in, and so are their parameters: log frequencies
rounded to half precision change the output by several percent.
Source: KohakuBlueleaf/HDM; the residual of `residual=prenorm` and the cross-attention of `skip_source=self`
are those of MK040412/Ouroboros.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from ...layers.attention import AttentionFn, widen
from ...layers.embeddings import sinusoidal, timestep_frequencies
from ...layers.modulation import Modulation, modulation
from ...layers.norm import RMSNorm, at_use
from ...layers.rope import Rotation, axial_angles, rotate_pairs, rotation
from ...ops import Ops
from .config import XUTConfig


class SharedModulation(NamedTuple):
    """One modulation for each kind of sub-layer, the same in every block."""

    attn: Modulation
    xattn: Modulation
    ffw: Modulation


@dataclass(frozen=True, slots=True, kw_only=True)
class Signals:
    """What steers the blocks, the same for all blocks of a stack; matrices compute in dtype.

    Shapes: condition `b 1 d` float32; positions `b n 2` or `1 n 2`, None = no rotation; bias and context_bias
    broadcastable to `b nh n n` and `b nh n m`; context `b m k`, the text that blocks cross-attend to.
    """

    dtype: torch.dtype
    condition: Tensor
    shared: SharedModulation | None = None
    positions: Tensor | None = None
    bias: Tensor | None = None
    context: Tensor | None = None
    context_bias: Tensor | None = None


class PatchEmbed(nn.Module):
    """Convolution whose stride is its size: a grid of latents becomes a row of tokens."""

    def __init__(self, config: XUTConfig, *, ops: Ops, device: torch.device | str | None = None) -> None:
        super().__init__()
        side = config.patch_size
        self.proj = ops.float_conv2d(config.input_dim, config.dim, side, stride=side, device=device)

    def forward(self, x: Tensor) -> Tensor:
        """Return tokens `b n d`, float32, of latents `b c h w`, rows first."""
        grid: Tensor = self.proj(x)
        return rearrange(grid, "b d h w -> b (h w) d")


class UnPatch(nn.Module):
    """The projection back to latents; the grid is rearranged by the model."""

    def __init__(self, config: XUTConfig, *, ops: Ops, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.proj = ops.float_linear(config.dim, config.patch_size**2 * config.input_dim, device=device)
        nn.init.normal_(self.proj.weight, std=config.dim**-2)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return `b n (p p c)`, float32, of tokens `b n d`."""
        patches: Tensor = self.proj(tokens)
        return patches


class TimestepEmbedding(nn.Module):
    """A vector for a time in [0, 1]. `freqs` only keeps its name in files: it is derived, never read."""

    freqs: Tensor

    def __init__(self, dim: int, *, ops: Ops, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.dim = dim
        self.register_buffer("freqs", timestep_frequencies(dim, device))
        self.proj = nn.Sequential(ops.float_linear(dim, dim, device=device), nn.Mish())

    def forward(self, t: Tensor) -> Tensor:
        """Return `b 1 d`, float32, for times `b`."""
        vector: Tensor = self.proj(sinusoidal(1000 * t.float(), self.dim))
        return vector[:, None]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Replace the stored frequencies, which half-precision files round, and stand in for missing ones."""
        state_dict[f"{prefix}freqs"] = timestep_frequencies(self.dim)
        super()._load_from_state_dict(state_dict, prefix, *args)


class DyT(nn.Module):
    """tanh(weight * x) in the place of a norm, with a weight per channel.

    Source: Zhu et al. 2025, arXiv:2503.10622, without its affine part.
    """

    def __init__(self, dim: int, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.in_weight = nn.Parameter(torch.ones(dim, device=device))

    def forward(self, x: Tensor, scale: Tensor | float = 1.0) -> Tensor:
        """Return tanh(weight * x) times scale, float32."""
        return torch.tanh(at_use(self.in_weight, x) * x.float()) * scale


class AdaLN(nn.Module):
    """Norm, then the modulation that the time gives: from the block's own head, or shared by the network."""

    def __init__(self, config: XUTConfig, *, ops: Ops, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.norm = (DyT if config.use_dyt else RMSNorm)(config.dim, device)
        self.adaln = None
        if not config.shared_adaln:
            self.adaln = zero_init(ops.float_linear(config.dim, 3 * config.dim, device=device))

    def forward(self, x: Tensor, condition: Tensor, shared: Modulation | None) -> tuple[Tensor, Tensor]:
        """Return norm(x) * scale + shift and the gate `b 1 d`, float32."""
        own = shared if self.adaln is None else modulation(self.adaln(condition))
        assert own is not None  # the model passes shared modulations exactly when blocks have no heads
        return self.norm(x, own.scale) + own.shift, own.gate


def zero_init(layer: nn.Linear) -> nn.Linear:
    """Return the layer with weight and bias set to zero."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class AxialRoPE(nn.Module):
    """Learned frequencies, kept as logarithms, for each head, index and axis."""

    def __init__(self, config: XUTConfig, device: torch.device | str | None = None) -> None:
        super().__init__()
        shape = (config.heads, config.dim_head // 4, 2)
        self.freqs = nn.Parameter(torch.full(shape, math.log(math.pi), device=device))

    def forward(self, positions: Tensor) -> Rotation:
        """Return the rotation at positions `b n 2`, float32."""
        return rotation(axial_angles(positions, at_use(self.freqs, positions).exp()))


class SelfAttention(nn.Module):
    """Attention among the tokens of one stream."""

    def __init__(self, config: XUTConfig, *, ops: Ops, **where: Any) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = ops.wide_linear(config.dim, 3 * config.dim, bias=False, **where)
        self.out = ops.wide_linear(config.dim, config.dim, **where)
        self.rope = AxialRoPE(config, where.get("device"))

    def forward(
        self, x: Tensor, positions: Tensor | None, bias: Tensor | None, attention: AttentionFn
    ) -> Tensor:
        """Return `b n d`; positions None leaves queries and keys unrotated."""
        q, k, v = rearrange(widen(self.qkv(x)), "b n (three nh e) -> three b nh n e", three=3, nh=self.heads)
        if positions is not None:
            turn = self.rope(positions)
            q, k = rotate_pairs(q, turn), rotate_pairs(k, turn)
        mixed: Tensor = self.out(attention(q, k, v, bias).to(x.dtype))
        return mixed


class CrossAttention(nn.Module):
    """Attention of a stream to a context of width context_dim."""

    def __init__(self, config: XUTConfig, context_dim: int, *, ops: Ops, **where: Any) -> None:
        super().__init__()
        self.heads = config.heads
        self.q = ops.wide_linear(config.dim, config.dim, bias=False, **where)
        self.kv = ops.wide_linear(context_dim, 2 * config.dim, bias=False, **where)
        self.out = ops.wide_linear(config.dim, config.dim, **where)
        self.rope = AxialRoPE(config, where.get("device"))

    def forward(
        self,
        x: Tensor,
        context: Tensor,
        positions: Tensor | None,
        context_positions: Tensor | None,
        bias: Tensor | None,
        attention: AttentionFn,
    ) -> Tensor:
        """Return `b n d`; keys are rotated only where context positions are given."""
        q = rearrange(widen(self.q(x)), "b n (nh e) -> b nh n e", nh=self.heads)
        k, v = rearrange(widen(self.kv(context)), "b m (two nh e) -> two b nh m e", two=2, nh=self.heads)
        turn = None
        if positions is not None:
            turn = self.rope(positions)
            q = rotate_pairs(q, turn)
        if context_positions is not None:
            same = turn is not None and context_positions is positions
            k = rotate_pairs(k, turn if same and turn is not None else self.rope(context_positions))
        mixed: Tensor = self.out(attention(q, k, v, bias).to(x.dtype))
        return mixed


class SwiGLU(nn.Module):
    """Gated feed-forward: w3(silu(u) * w) with u, w the halves of w12."""

    def __init__(self, config: XUTConfig, *, ops: Ops, **where: Any) -> None:
        super().__init__()
        self.w12 = ops.wide_linear(config.dim, 2 * config.mlp_dim, **where)
        self.w3 = ops.wide_linear(config.mlp_dim, config.dim, **where)

    def forward(self, x: Tensor) -> Tensor:
        """Return `b n d`."""
        gate, value = self.w12(x).chunk(2, dim=-1)
        result: Tensor = self.w3(functional.silu(gate) * value)
        return result


class Block(nn.Module):
    """Self-attention, cross-attention if context_dim is given, feed-forward; each normed, modulated, gated.

    In the reference the residual is the normed, modulated stream h, not the stream: x = h + gate * f(h).
    """

    def __init__(self, config: XUTConfig, context_dim: int | None, *, ops: Ops, **where: Any) -> None:
        super().__init__()
        self.is_prenorm = config.residual == "prenorm"
        self.attends_to_itself = config.skip_source == "self"
        device = where.get("device")
        self.attn = SelfAttention(config, ops=ops, **where)
        self.xattn = None if context_dim is None else CrossAttention(config, context_dim, ops=ops, **where)
        self.mlp = SwiGLU(config, ops=ops, **where)
        self.attn_pre_norm = AdaLN(config, ops=ops, device=device)
        self.xattn_pre_norm = None if context_dim is None else AdaLN(config, ops=ops, device=device)
        self.mlp_pre_norm = AdaLN(config, ops=ops, device=device)

    def forward(
        self, x: Tensor, signals: Signals, attention: AttentionFn, encoded: Tensor | None = None
    ) -> Tensor:
        """Return the stream `b n d` after the block, float32; a first decoder block reads encoded `b n d`."""
        condition, positions = signals.condition, signals.positions
        shared = signals.shared or (None, None, None)
        dtype = signals.dtype

        h, gate = self.attn_pre_norm(x, condition, shared[0])
        branch = self.attn(h.to(dtype), positions, signals.bias, attention)
        x = torch.addcmul(x if self.is_prenorm else h, gate, branch)

        if self.xattn is not None and self.xattn_pre_norm is not None:
            source, places, bias = self._cross_source(x, signals, encoded)
            h, gate = self.xattn_pre_norm(x, condition, shared[1])
            branch = self.xattn(h.to(dtype), source.to(dtype), positions, places, bias, attention)
            x = torch.addcmul(x if self.is_prenorm else h, gate, branch)

        h, gate = self.mlp_pre_norm(x, condition, shared[2])
        branch = self.mlp(h.to(dtype))
        return torch.addcmul(x if self.is_prenorm else h, gate, branch)

    def _cross_source(
        self, x: Tensor, signals: Signals, encoded: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Tokens, positions, bias of the encoder's output (in the JAX port of the stream), or of the text."""
        if encoded is None:
            assert signals.context is not None  # the model checks that text is there
            return signals.context, None, signals.context_bias
        return x if self.attends_to_itself else encoded, signals.positions, signals.bias
