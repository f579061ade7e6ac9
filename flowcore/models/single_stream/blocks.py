"""The blocks of SingleStreamDiT: one for text alone, one for everything that holds the image.

Parameters carry the names of the published checkpoints. The stream, the norms and the filters are float32
whatever the matrices compute in, and so are the parameters of norms and filters.
Source: Particle1904/SingleStreamDiT_T5Gemma2, model.py.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from ...layers.attention import AttentionFn, widen
from ...layers.norm import RMSNorm
from ...ops import Ops, Runtime
from .config import SingleStreamConfig
from .fourier import ChannelMixer, SpectralGain
from .positions import HalfRotation
from .steps import add_to_last, gated_sum, modulated, turned


@dataclass(frozen=True, slots=True, kw_only=True)
class Signals:
    """What steers the blocks of a stack. Matrices compute in the dtype of condition.

    Shapes: condition `b d`; rotation of the stream's tokens, None = no turns; bias broadcastable to
    `b nh n n`; the last rows * columns tokens of the stream are the image.
    """

    condition: Tensor
    rotation: HalfRotation | None = None
    bias: Tensor | None = None
    rows: int = 0
    columns: int = 0


class SwiGLU(nn.Module):
    """Gated feed-forward: w3(silu(w1 x) * w2 x)."""

    def __init__(self, config: SingleStreamConfig, *, ops: Ops, **where: Any) -> None:
        super().__init__()
        self.w1 = ops.linear(config.hidden_size, config.mlp_dim, bias=False, **where)
        self.w2 = ops.linear(config.hidden_size, config.mlp_dim, bias=False, **where)
        self.w3 = ops.linear(config.mlp_dim, config.hidden_size, bias=False, **where)

    def forward(self, x: Tensor) -> Tensor:
        """Return `b n d`."""
        gate, value = self.w1(x), self.w2(x)  # b n f
        if torch.is_grad_enabled():
            hidden = functional.silu(gate) * value
        else:  # fresh memory for the widest tensors of the model takes a CPU longer than the arithmetic
            hidden = functional.silu(gate, inplace=True).mul_(value)
        result: Tensor = self.w3(hidden)
        return result


class Block(nn.Module):
    """The layers that all blocks have: attention with normed queries and keys, and a feed-forward."""

    def __init__(self, config: SingleStreamConfig, *, ops: Ops, **where: Any) -> None:
        super().__init__()
        dim, device = config.hidden_size, where.get("device")
        self.num_heads = config.num_heads
        self.attention_q = ops.linear(dim, dim, bias=False, **where)
        self.attention_k = ops.linear(dim, dim, bias=False, **where)
        self.attention_v = ops.linear(dim, dim, bias=False, **where)
        self.attention_out = ops.linear(dim, dim, bias=False, **where)
        self.attention_norm_q = RMSNorm(config.head_dim, device)
        self.attention_norm_k = RMSNorm(config.head_dim, device)
        self.attention_norm1 = RMSNorm(dim, device)
        self.ffn_norm1 = RMSNorm(dim, device)
        self.feed_forward = SwiGLU(config, ops=ops, **where)

    def attend(self, x: Tensor, signals: Signals, attention: AttentionFn) -> Tensor:
        """Return the attention among tokens x `b n d`, projected, in the dtype of x."""
        q, k, v = (
            rearrange(widen(layer(x)), "b n (nh e) -> b n nh e", nh=self.num_heads)
            for layer in (self.attention_q, self.attention_k, self.attention_v)
        )
        q = turned(q, self.attention_norm_q, signals.rotation)
        k = turned(k, self.attention_norm_k, signals.rotation)
        q, k, v = (part.to(v.dtype).transpose(1, 2) for part in (q, k, v))  # b nh n e
        result: Tensor = self.attention_out(attention(q, k, v, signals.bias).to(x.dtype))
        return result


class ContextBlock(Block):
    """Attention and feed-forward among text tokens, which no time reaches."""

    def forward(self, x: Tensor, signals: Signals, attention: AttentionFn, seed: int | None) -> Tensor:  # noqa: ARG002 - as in FusionBlock
        """Return the text tokens `b m d` after the block, float32."""
        dtype = signals.condition.dtype
        x = x + self.attend(self.attention_norm1(x).to(dtype), signals, attention)
        result: Tensor = x + self.feed_forward(self.ffn_norm1(x).to(dtype))
        return result


class LocalBias(nn.Module):
    """A 3 x 3 convolution of each channel by itself, over the grid of image tokens."""

    def __init__(self, config: SingleStreamConfig, *, ops: Ops, **where: Any) -> None:
        super().__init__()
        dim = config.hidden_size
        self.is_reflected = config.variant == "head"
        padding, bias = (0, False) if self.is_reflected else (1, True)
        self.conv = ops.conv2d(dim, dim, kernel_size=3, padding=padding, groups=dim, bias=bias, **where)

    def forward(self, x: Tensor, rows: int, columns: int) -> Tensor:
        """Return `b n d` of image tokens x `b n d`."""
        grid = rearrange(x, "b (h w) d -> b d h w", h=rows, w=columns)
        if self.is_reflected:
            grid = functional.pad(grid, (1, 1, 1, 1), mode="reflect")
        result: Tensor = self.conv(grid.contiguous(memory_format=torch.channels_last))
        return rearrange(result, "b d h w -> b (h w) d")


class FusionBlock(Block):
    """Attention and feed-forward of a stream that ends in the image, steered by the time.

    Image tokens also see their neighbours (local bias) and, where the block has a filter, all of the image by
    frequency. V3's filter has a norm of its own and stands beside the feed-forward, HEAD's stands alone.
    """

    def __init__(self, config: SingleStreamConfig, *, has_filter: bool, ops: Ops, **where: Any) -> None:
        super().__init__(config, ops=ops, **where)
        dim, device = config.hidden_size, where.get("device")
        is_v3 = config.variant == "v3"
        self.dropout = config.dropout
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), ops.linear(dim, 6 * dim, **where))
        self.local_bias = LocalBias(config, ops=ops, **where)
        self.fourier_norm = RMSNorm(dim, device) if has_filter and is_v3 else None
        self.fourier_filter = None
        if has_filter:
            self.fourier_filter = (ChannelMixer if is_v3 else SpectralGain)(config, ops=ops, device=device)

    def forward(self, x: Tensor, signals: Signals, attention: AttentionFn, seed: int | None) -> Tensor:
        """Return the stream `b n d` after the block, float32; seed: of this call's dropout, None = none."""
        dtype, rows, columns = signals.condition.dtype, signals.rows, signals.columns
        num_image = rows * columns
        drop = Dropout(self.dropout, seed, x.device)
        raw = self.adaLN_modulation(signals.condition).float()[:, None]  # b 1 (6 d)
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = raw.chunk(6, dim=-1)

        h = modulated(x, self.attention_norm1, scale, shift)
        x = gated_sum(x, gate.tanh(), drop(self.attend(h.to(dtype), signals, attention)))
        x = add_to_last(x, self.local_bias(x[:, -num_image:].to(dtype), rows, columns))

        h = modulated(x, self.ffn_norm1, ffn_scale, ffn_shift)
        image = h[:, -num_image:]
        update = self.feed_forward(h.to(dtype))
        if self.fourier_filter is not None and self.fourier_norm is not None:
            update = add_to_last(update, self.fourier_filter(self.fourier_norm(image), rows, columns))
        x = gated_sum(x, ffn_gate.tanh(), drop(update))
        if self.fourier_filter is not None and self.fourier_norm is None:
            x = add_to_last(x, self.fourier_filter(image, rows, columns))
        return x


class Dropout:
    """Zeroes a share of values, scaling the others up. A seed gives the same choices again.

    So a block that is computed twice, for lack of memory, drops the same values twice.
    """

    def __init__(self, rate: float, seed: int | None, device: torch.device) -> None:
        """Take the share to drop; seed None drops nothing."""
        self.rate = 0.0 if seed is None else rate
        self.generator = None
        if self.rate and seed is not None and device.type != "meta":
            self.generator = torch.Generator(device).manual_seed(seed)

    def __call__(self, x: Tensor) -> Tensor:
        """Return x with fresh choices."""
        if not self.rate:
            return x
        keep = torch.empty_like(x).bernoulli_(1 - self.rate, generator=self.generator)
        return x * keep / (1 - self.rate)


def run_blocks(
    kind: str,
    blocks: nn.ModuleList,
    x: Tensor,
    signals: Signals,
    runtime: Runtime,
    seeds: Sequence[int | None],
) -> Tensor:
    """Return x after the blocks, each called through the runtime under its kind and number.

    seeds: one for each block.
    """
    typed = cast("Iterable[ContextBlock | FusionBlock]", blocks)
    for index, (block, seed) in enumerate(zip(typed, seeds, strict=True)):
        call = partial(block, signals=signals, attention=runtime.attention, seed=seed)
        x = runtime.run_block(kind, index, call, x)
    return x
