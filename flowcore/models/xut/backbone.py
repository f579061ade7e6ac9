"""The U: encoder stages, then decoder stages that look back at the encoder's end; and token routing."""

from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from einops import repeat
from torch import Tensor, nn

from ...ops import Ops, Runtime
from .blocks import Block, Signals
from .config import XUTConfig


class Backbone(nn.Module):
    """Encoder and decoder stages of blocks.

    The first block of every decoder stage cross-attends to the output of the last encoder stage. The report
    draws mirrored pairs; code and weights have none.
    """

    def __init__(self, config: XUTConfig, *, ops: Ops, **where: Any) -> None:
        super().__init__()
        text = config.cross_ctx_dim
        self.enc_blocks = nn.ModuleList(
            nn.ModuleList(Block(config, text, ops=ops, **where) for _ in range(count))
            for count in config.enc_block_counts
        )
        later = text if config.dec_ctx else None
        self.dec_blocks = nn.ModuleList(
            nn.ModuleList(Block(config, later if j else config.dim, ops=ops, **where) for j in range(count))
            for count in config.dec_block_counts
        )

    def forward(self, x: Tensor, signals: Signals, runtime: Runtime) -> tuple[Tensor, Tensor]:
        """Return the decoder's and the encoder's output, both `b n d`."""
        x = encoded = run_blocks("enc", _stages(self.enc_blocks), x, signals, runtime)
        return run_blocks("dec", _stages(self.dec_blocks), x, signals, runtime, encoded), encoded


class PlainBlocks(nn.Module):
    """A row of blocks before or after the backbone, which always sees every token."""

    def __init__(self, config: XUTConfig, depth: int, *, ops: Ops, **where: Any) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            Block(config, config.cross_ctx_dim, ops=ops, **where) for _ in range(depth)
        )

    def forward(self, kind: str, x: Tensor, signals: Signals, runtime: Runtime) -> Tensor:
        """Return the stream `b n d` after all blocks; kind names them for the runtime."""
        return run_blocks(kind, _stages([self.blocks]), x, signals, runtime)


def run_blocks(
    kind: str,
    stages: Iterable[Iterable[Block]],
    x: Tensor,
    signals: Signals,
    runtime: Runtime,
    encoded: Tensor | None = None,
) -> Tensor:
    """Return x after the blocks of all stages, each called through the runtime under its kind and number.

    encoded: what the first block of every stage cross-attends to.
    """
    index = 0
    for stage in stages:
        source = encoded
        for block in stage:
            call = partial(block, signals=signals, attention=runtime.attention, encoded=source)
            x = runtime.run_block(kind, index, call, x)
            source = None
            index += 1
    return x


def _stages(stages: Iterable[nn.Module]) -> Iterable[Iterable[Block]]:
    """The stages of a ModuleList with the type of what they hold."""
    return cast("Iterable[Iterable[Block]]", stages)


class Routing:
    """A choice of image tokens, by sample, that go through the backbone; text tokens always do.

    Source: Krause et al. 2025, arXiv:2501.04765 (TREAD).
    """

    def __init__(self, kept: Tensor, num_image: int) -> None:
        """Take the indices `b k` of kept image tokens, ascending, out of num_image."""
        self.kept = kept
        self.num_image = num_image

    def pick(self, rows: Tensor) -> Tensor:
        """Return the kept rows of `b n d`, `b (k + m) d`: image tokens in order, then all text tokens."""
        rows = rows.expand(self.kept.shape[0], -1, -1)
        image, text = rows[:, : self.num_image], rows[:, self.num_image :]
        return torch.cat((image.gather(1, self._index(rows)), text), dim=1)

    def put_back(self, routed: Tensor, original: Tensor) -> Tensor:
        """Return original `b n d` with its kept rows replaced by the routed ones."""
        num_kept = self.kept.shape[1]
        image = original[:, : self.num_image].scatter(1, self._index(original), routed[:, :num_kept])
        return torch.cat((image, routed[:, num_kept:]), dim=1)

    def pick_signals(self, signals: Signals) -> Signals:
        """Return the signals for the kept tokens; a bias is one of text keys, which follow the image's."""
        assert signals.positions is not None
        bias = signals.bias
        if bias is not None:
            bias = bias[..., self.num_image - self.kept.shape[1] :]
        return replace(signals, positions=self.pick(signals.positions), bias=bias)

    def _index(self, rows: Tensor) -> Tensor:
        return repeat(self.kept, "b k -> b k d", d=rows.shape[-1])


def choose_tokens(batch: int, count: int, rate: float, generator: torch.Generator) -> Tensor:
    """Return the indices `b k` of the tokens that stay, k = count - int(count * rate).

    Every sample has its own random choice; indices are ascending, on the generator's device.
    """
    keep = count - int(count * rate)
    order = torch.rand(batch, count, generator=generator, device=generator.device).argsort(dim=1)
    return order[:, :keep].sort(dim=1).values
