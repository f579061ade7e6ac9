"""What the trunk sees of latents and pictures: features, the memory grid, the suffix, the adapters."""

from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from ...layers.attention import AttentionFn
from ...layers.norm import RMSNorm, at_use
from ...ops import Ops
from .blocks import CrossAttention, KeysValuesPair, TimeMLP
from .config import MAX_ITERATIONS, ExoConfig
from .grids import CELL, memory_grid, padded, position_features
from .labels import cell_distances

_REFERENCE = 32.0
_STEPS, _RATIOS, _STEEP = 16, (-1.0, 4.0), 4.0
"""Steps in which a distance is told: how many, from and to which logarithm of a ratio, and how steep."""
_SMALL = 0.02
"""Squared distance that says nothing: about the error of the estimated latents."""


class Projector(nn.Module):
    """From visual tokens to features on the latent grid, and on to an estimate of the picture's latents."""

    def __init__(self, config: ExoConfig, *, ops: Ops, **where: Any) -> None:
        super().__init__()
        wide, narrow = config.projector_dim, config.feature_dim
        self.norm = RMSNorm(config.hidden_size, where.get("device"))
        self.inp = ops.linear(config.hidden_size, wide, **where)
        self.upscale = config.projector_upscale
        self.conv1 = ops.conv2d(wide, wide, kernel_size=3, padding=1, **where)
        self.conv2 = ops.conv2d(wide, narrow * self.upscale**2, kernel_size=3, padding=1, **where)
        self.conv3 = ops.conv2d(narrow, narrow, kernel_size=3, padding=1, **where)
        self.out = ops.conv2d(narrow, config.latent_channels, kernel_size=3, padding=1, **where)

    def forward(self, tokens: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
        """Return features `b c h w` on latents of size (h, w), of visual tokens `b n d` on a grid."""
        x = functional.gelu(self.inp(self.norm(tokens).to(tokens.dtype)))
        x = rearrange(x, "b (h w) c -> b c h w", h=grid[0])
        x = x + functional.gelu(self.conv1(x))
        x = functional.pixel_shuffle(functional.gelu(self.conv2(x)), self.upscale)
        if x.shape[-2:] != size:
            x = functional.interpolate(x, size=size, mode="bilinear", align_corners=False)
        return x + functional.gelu(self.conv3(x))

    def latents(self, features: Tensor) -> Tensor:
        """Return the estimate of the picture's clean latents, `b c h w`, of its features."""
        result: Tensor = self.out(features)
        return result


class Memory(nn.Module):
    """The noised latents, the picture's features and the pending edits, a cell for 2 x 2 latents."""

    def __init__(self, config: ExoConfig, *, ops: Ops, **where: Any) -> None:
        super().__init__()
        dim, shape = config.memory_dim, {"kernel_size": CELL, "stride": CELL}
        self.embed = ops.conv2d(config.latent_channels, dim, **shape, **where)
        self.visual = ops.conv2d(config.feature_dim, dim, bias=False, **shape, **where)
        self.compared = self.distance = None
        if config.memory_compares:
            self.compared = ops.conv2d(config.latent_channels, dim, bias=False, **shape, **where)
            self.distance = ops.linear(_STEPS, dim, bias=False, **where)
            if not self.embed.weight.is_meta:
                with torch.no_grad():
                    self.compared.weight.copy_(-self.embed.weight)
            nn.init.zeros_(self.distance.weight)
        self.edit = ops.linear(config.hidden_size, dim, bias=False, **where)
        self.norm = RMSNorm(dim, where.get("device"))

    def base(self, z: Tensor, t: Tensor, features: Tensor | None, estimate: Tensor | None) -> Tensor:
        """Return what stays the same in all iterations of a step, `b (hm wm) d` float32; times t `b`.

        features, estimate: of the picture; only a memory that compares has a use for its estimated latents.
        """
        grid = self.embed(padded(z, CELL))
        if features is not None:
            grid = grid + self.visual(padded(features, CELL))
        apart: Tensor | None = None
        if self.compared is not None and self.distance is not None and estimate is not None:
            faded = rearrange(1 - t, "b -> b 1 1 1").to(z) * estimate
            grid = grid + self.compared(padded(faded, CELL))
            # a sample without a picture has an estimate of zeros, from which nothing is far or near
            steps = _distance_steps(z, faded, t) * estimate.flatten(1).any(dim=1)[:, None, None]
            apart = self.distance(steps.to(z.dtype)).float()
        tokens: Tensor = rearrange(grid, "b d h w -> b (h w) d").float()
        if apart is not None:
            tokens = tokens + apart
        places = position_features(memory_grid(*z.shape[-2:]), tokens.shape[-1], _REFERENCE, z.device)
        return tokens + places

    def forward(self, base: Tensor, edits: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Return the memory `b n d` in dtype; edits `b n k`, None = none yet."""
        if edits is not None:
            base = base + self.edit(edits.to(dtype))
        result: Tensor = self.norm(base)
        return result.to(dtype)


def _distance_steps(z: Tensor, faded: Tensor, t: Tensor) -> Tensor:
    """Return how far cells are from the fading picture beyond what noise alone makes, `b n k` in 0..1.

    It is the logarithm of a ratio of squares, as smooth steps.
    """
    found = cell_distances(faded, z).flatten(1)
    ratio = ((found + _SMALL) / (t.float().square()[:, None] + _SMALL)).log()
    places = torch.linspace(*_RATIOS, _STEPS, device=z.device)
    return (_STEEP * (ratio[..., None] - places)).sigmoid()


class SuffixTokens(nn.Module):
    """What an iteration appends to the sequence: timestep, number of the iteration, learned queries."""

    def __init__(self, config: ExoConfig, *, ops: Ops, **where: Any) -> None:
        super().__init__()
        dim = config.hidden_size
        self.timestep = TimeMLP(config.time_dim, dim, ops=ops, **where)
        self.iteration = ops.embedding(MAX_ITERATIONS, dim, **where)
        self.query = (
            nn.Parameter(torch.empty(config.num_queries, dim, **where)) if config.num_queries else None
        )
        self.norm = RMSNorm(dim, where.get("device"))
        for table in (self.iteration.weight, self.query):
            if table is not None:
                nn.init.normal_(table, std=0.02)

    def forward(self, time: Tensor, iteration: int) -> Tensor:
        """Return `b s d` for the vectors `b d` of `self.timestep`."""
        number = torch.full((1,), iteration, device=time.device)
        parts = [time[:, None], self.iteration(number).to(time.dtype).expand(time.shape[0], 1, -1)]
        if self.query is not None:
            parts.append(self.query.to(time).expand(time.shape[0], -1, -1))
        result: Tensor = self.norm(torch.cat(parts, dim=1))
        return result.to(time.dtype)


class Adapter(nn.Module):
    """Gated attention of the suffix to the memory; the gate is closed at first."""

    def __init__(self, config: ExoConfig, *, ops: Ops, **where: Any) -> None:
        super().__init__()
        dim = config.hidden_size
        self.gate = nn.Parameter(torch.zeros(1, **where))
        self.norm = RMSNorm(dim, where.get("device"))
        self.attn = CrossAttention(
            dim,
            config.adapter_head_dim,
            context_dim=config.memory_dim,
            inner_dim=config.adapter_dim,
            ops=ops,
            **where,
        )

    def forward(self, x: Tensor, memory: KeysValuesPair, attention: AttentionFn) -> Tensor:
        """Return the suffix `b s d` after it has looked at the memory."""
        seen: Tensor = self.attn(self.norm(x).to(memory.values.dtype), memory, attention)
        return x + (at_use(self.gate, x).tanh() * seen).to(x.dtype)
