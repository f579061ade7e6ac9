"""The parts of TinyFlux: embedders, norms, the attention that Sol steers, and the two kinds of block.

Text and image are one row of tokens, text first, through the whole network; double blocks split it. The row,
the norms, the rotations and all that steers the blocks are float32 whatever the blocks' matrices compute in,
and so are their parameters.
Parameters carry the names of the published checkpoints.
Source: AbstractEyes/tiny-flux, version 4.2.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from ...layers.attention import AttentionFn, widen
from ...layers.norm import RMSNorm, at_use
from ...layers.rope import Rotation, rotate_pairs, rotation
from ...ops import Ops
from .config import TinyFluxConfig

_THETA = 10_000.0
_MAX_LOG_FACTOR = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Signals:
    """What steers the blocks, the same for all of them; matrices compute in dtype.

    Shapes: condition `b 1 d`, importance `b 1 h w`, inverse_temperature `b 1 1 1` are float32, the last two
    None without Sol; bias broadcastable to `b nh l l`, l = m + n. double_turn leaves text as it is.
    """

    num_text: int
    dtype: torch.dtype
    condition: Tensor
    double_turn: Rotation
    single_turn: Rotation
    bias: Tensor | None = None
    importance: Tensor | None = None
    inverse_temperature: Tensor | None = None


class AdaNorm(nn.Module):
    """The norm before attention, and the vectors that the condition gives to the block."""

    def __init__(
        self, dim: int, num_vectors: int, *, ops: Ops, device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        self.num_vectors = num_vectors
        self.linear = ops.float_linear(dim, num_vectors * dim, device=device)
        self.norm = RMSNorm(dim, device)

    def forward(self, x: Tensor, condition: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return the modulated norm of x `b l d`, and the vectors `b 1 d` that are left, float32."""
        shift, scale, *rest = self.linear(condition).float().chunk(self.num_vectors, dim=-1)
        return self.norm(x, 1 + scale) + shift, tuple(rest)


class TimestepEmbedding(nn.Module):
    """A vector for a number: sines, then cosines, through two layers. The number is not scaled."""

    def __init__(
        self, dim: int, *, ops: Ops, device: torch.device | str | None = None, num_channels: int = 256
    ) -> None:
        super().__init__()
        self.num_channels = num_channels
        self.mlp = nn.Sequential(
            ops.float_linear(num_channels, dim, device=device),
            nn.SiLU(),
            ops.float_linear(dim, dim, device=device),
        )

    def forward(self, values: Tensor) -> Tensor:
        """Return `b d`, float32, for values `b`."""
        half = self.num_channels // 2
        steps = torch.arange(half, dtype=torch.float32, device=values.device)
        angles = values.float()[:, None] * torch.exp(steps * (-math.log(_THETA) / (half - 1)))
        vector: Tensor = self.mlp(torch.cat((angles.sin(), angles.cos()), dim=-1))
        return vector


class RotaryTables(nn.Module):
    """Frequencies of the position axes, kept in files as buffers, which half-precision files round."""

    def __init__(self, axes: tuple[int, ...], device: torch.device | str | None = None) -> None:
        super().__init__()
        self.axes = axes
        for axis, size in enumerate(axes):
            self.register_buffer(f"freqs_{axis}", _frequencies(size, device))

    def forward(self, positions: Tensor) -> Rotation:
        """Return the rotation at positions `n a`, float32."""
        angles = [
            positions[:, axis, None].float() * at_use(self.get_buffer(f"freqs_{axis}"), positions)
            for axis in range(len(self.axes))
        ]
        return rotation(torch.cat(angles, dim=-1))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Stand in for frequencies that a file lacks."""
        for axis, size in enumerate(self.axes):
            state_dict.setdefault(f"{prefix}freqs_{axis}", _frequencies(size, None))
        super()._load_from_state_dict(state_dict, prefix, *args)


def grid_positions(rows: int, columns: int, device: torch.device | None = None) -> Tensor:
    """Return (0, row, column) of the cells of a grid, row by row, `n 3`, float32."""
    places = [torch.arange(count, dtype=torch.float32, device=device) for count in (1, rows, columns)]
    return torch.cartesian_prod(*places)


def _frequencies(size: int, device: torch.device | str | None) -> Tensor:
    """Return theta^(-2 j / size) for j = 0 .. size/2 - 1, float32."""
    return _THETA ** (-torch.arange(0, size, 2, dtype=torch.float32, device=device) / size)


class MLP(nn.Module):
    """Two layers with the tanh form of GELU between."""

    def __init__(self, config: TinyFluxConfig, *, ops: Ops, **where: Any) -> None:
        super().__init__()
        self.fc1 = ops.wide_linear(config.hidden_size, config.mlp_dim, **where)
        self.fc2 = ops.wide_linear(config.mlp_dim, config.hidden_size, **where)

    def forward(self, x: Tensor) -> Tensor:
        """Return `b l d`."""
        result: Tensor = self.fc2(functional.gelu(self.fc1(x), approximate="tanh"))
        return result


class HeadMaps(nn.Module):
    """A convolution of size 1 from one map to one for each head, zero at first, in float32."""

    def __init__(self, heads: int, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(heads, 1, 1, 1, device=device))
        self.bias = nn.Parameter(torch.zeros(heads, device=device))

    def forward(self, x: Tensor) -> Tensor:
        """Return `b nh h w` of x `b 1 h w`."""
        return x * at_use(self.weight, x)[:, 0] + at_use(self.bias, x)[:, None, None]


class SteeredAttention(nn.Module):
    """What both attentions do between their projections; subclasses own those.

    Sol makes image queries and keys longer or shorter where an image is important, head by head, and divides
    the logits by a temperature.
    """

    def __init__(self, config: TinyFluxConfig, device: torch.device | str | None) -> None:
        super().__init__()
        self.heads = config.num_attention_heads
        self.spatial_to_mod = None
        if config.use_sol_prior:
            self.spatial_to_mod = HeadMaps(config.num_attention_heads, device)

    def mix(
        self, qkv: Tensor, turn: Rotation, signals: Signals, attention: AttentionFn, *, cools_text: bool
    ) -> Tensor:
        """Return the mixed values `b l d` of projections `b l (three nh e)`.

        cools_text: whether the temperature acts on text queries, too.
        """
        dtype = qkv.dtype
        queries_keys, values = widen(qkv).split((2 * qkv.shape[-1] // 3, qkv.shape[-1] // 3), dim=-1)
        # Queries and keys are turned and scaled as one tensor of twice as many heads.
        turned = rotate_pairs(rearrange(queries_keys, "b l (nh e) -> b nh l e", nh=2 * self.heads), turn)
        factors = self._factors(signals, cools_text)
        if factors is not None:
            turned = (turned * factors).to(turned.dtype)
        q, k = turned.chunk(2, dim=1)
        v = rearrange(values, "b l (nh e) -> b nh l e", nh=self.heads)
        return attention(q, k, v, signals.bias).to(dtype)

    def _factors(self, signals: Signals, cools_text: bool) -> Tensor | None:
        """Return what queries and keys are multiplied by, `b (two nh) l 1` float32; None = nothing."""
        if self.spatial_to_mod is None or signals.importance is None or signals.inverse_temperature is None:
            return None
        logs: Tensor = self.spatial_to_mod(signals.importance)  # b nh h w
        image = logs.clamp(-_MAX_LOG_FACTOR, _MAX_LOG_FACTOR).exp().flatten(2)[..., None]  # b nh n 1
        text = image.new_ones(*image.shape[:2], signals.num_text, 1)
        cold = signals.inverse_temperature
        queries = torch.cat((text * cold if cools_text else text, image * cold), dim=2)
        return torch.cat((queries, torch.cat((text, image), dim=2)), dim=1)


class JointAttention(SteeredAttention):
    """Attention over text and image with projections of their own."""

    def __init__(self, config: TinyFluxConfig, *, ops: Ops, **where: Any) -> None:
        super().__init__(config, where.get("device"))
        dim = config.hidden_size
        self.txt_qkv = ops.wide_linear(dim, 3 * dim, bias=False, **where)
        self.img_qkv = ops.wide_linear(dim, 3 * dim, bias=False, **where)
        self.txt_out = ops.wide_linear(dim, dim, bias=False, **where)
        self.img_out = ops.wide_linear(dim, dim, bias=False, **where)

    def forward(
        self, txt: Tensor, img: Tensor, signals: Signals, attention: AttentionFn
    ) -> tuple[Tensor, Tensor]:
        """Return text `b m d` and image `b n d`. Text queries know no temperature."""
        qkv = torch.cat((self.txt_qkv(txt), self.img_qkv(img)), dim=1)  # b (m + n) (three nh e)
        mixed = self.mix(qkv, signals.double_turn, signals, attention, cools_text=False)
        return self.txt_out(mixed[:, : signals.num_text]), self.img_out(mixed[:, signals.num_text :])


class Attention(SteeredAttention):
    """Attention over the whole row of tokens."""

    def __init__(self, config: TinyFluxConfig, *, ops: Ops, **where: Any) -> None:
        super().__init__(config, where.get("device"))
        self.qkv = ops.wide_linear(config.hidden_size, 3 * config.hidden_size, bias=False, **where)
        self.out_proj = ops.wide_linear(config.hidden_size, config.hidden_size, bias=False, **where)

    def forward(self, x: Tensor, signals: Signals, attention: AttentionFn) -> Tensor:
        """Return `b l d`."""
        mixed = self.mix(self.qkv(x), signals.single_turn, signals, attention, cools_text=True)
        result: Tensor = self.out_proj(mixed)
        return result


class DoubleBlock(nn.Module):
    """Text and image with weights of their own, joined in attention; everything modulated and gated."""

    def __init__(self, config: TinyFluxConfig, *, ops: Ops, **where: Any) -> None:
        super().__init__()
        dim, device = config.hidden_size, where.get("device")
        self.img_norm1 = AdaNorm(dim, 6, ops=ops, device=device)
        self.txt_norm1 = AdaNorm(dim, 6, ops=ops, device=device)
        self.attn = JointAttention(config, ops=ops, **where)
        self.img_norm2 = RMSNorm(dim, device)
        self.txt_norm2 = RMSNorm(dim, device)
        self.img_mlp = MLP(config, ops=ops, **where)
        self.txt_mlp = MLP(config, ops=ops, **where)

    def forward(self, x: Tensor, signals: Signals, attention: AttentionFn) -> Tensor:
        """Return the row `b (m + n) d` after the block, float32."""
        txt, img = x[:, : signals.num_text], x[:, signals.num_text :]
        txt_normed, txt_vectors = self.txt_norm1(txt, signals.condition)
        img_normed, img_vectors = self.img_norm1(img, signals.condition)
        dtype = signals.dtype
        txt_mixed, img_mixed = self.attn(txt_normed.to(dtype), img_normed.to(dtype), signals, attention)
        txt = _after_attention(txt, txt_mixed, txt_vectors, self.txt_norm2, self.txt_mlp)
        img = _after_attention(img, img_mixed, img_vectors, self.img_norm2, self.img_mlp)
        return torch.cat((txt, img), dim=1)


def _after_attention(
    x: Tensor, mixed: Tensor, vectors: tuple[Tensor, ...], norm: nn.Module, mlp: nn.Module
) -> Tensor:
    """Return one stream `b l d` of a double block after its gated attention and feed-forward."""
    attn_gate, shift, scale, mlp_gate = vectors
    x = torch.addcmul(x, attn_gate, mixed)
    normed = norm(x, 1 + scale) + shift
    return torch.addcmul(x, mlp_gate, mlp(normed.to(mixed.dtype)))


class SingleBlock(nn.Module):
    """Attention, then a feed-forward that is neither modulated nor gated (Flux has them side by side)."""

    def __init__(self, config: TinyFluxConfig, *, ops: Ops, **where: Any) -> None:
        super().__init__()
        dim, device = config.hidden_size, where.get("device")
        self.norm = AdaNorm(dim, 3, ops=ops, device=device)
        self.attn = Attention(config, ops=ops, **where)
        self.mlp = MLP(config, ops=ops, **where)
        self.norm2 = RMSNorm(dim, device)

    def forward(self, x: Tensor, signals: Signals, attention: AttentionFn) -> Tensor:
        """Return the row `b (m + n) d` after the block, float32."""
        dtype = signals.dtype
        normed, (gate,) = self.norm(x, signals.condition)
        x = torch.addcmul(x, gate, self.attn(normed.to(dtype), signals, attention))
        result: Tensor = x + self.mlp(self.norm2(x).to(dtype))
        return result
