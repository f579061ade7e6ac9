"""The head that gives the velocity: a transformer over latents with the trunk's states as context."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from ...layers.attention import AttentionFn
from ...layers.norm import RMSNorm, at_use
from ...layers.rope import Rotation, position_rotation
from ...ops import Ops, Runtime
from .blocks import CrossAttention, KeysValuesPair, SelfAttention, SwiGLU, TimeMLP, layer_norm
from .config import ExoConfig
from .grids import grid_places, memory_grid, padded, position_features, spread

_REFERENCE = 64.0
_THETA = 1e4


@dataclass(frozen=True, slots=True, kw_only=True)
class Signals:
    """What steers the blocks, the same for all of them. Matrices compute in dtype.

    Shapes: modulation `b 6 d` float32; keep `b 1 1 m`, which context is there.
    """

    modulation: Tensor
    turn: Rotation
    keep: Tensor
    dtype: torch.dtype


class Block(nn.Module):
    """Attention among latents, attention to the context, feed-forward; the first and last are modulated."""

    def __init__(self, config: ExoConfig, *, ops: Ops, **where: Any) -> None:
        super().__init__()
        dim, head_dim = config.diffusion_dim, config.diffusion_head_dim
        self.table = nn.Parameter(torch.zeros(6, dim, **where))
        self.attn = SelfAttention(dim, head_dim, ops=ops, **where)
        self.cross_norm = RMSNorm(dim, where.get("device"))
        self.cross = CrossAttention(dim, head_dim, ops=ops, **where)
        self.mlp = SwiGLU(dim, ops=ops, **where)
        nn.init.zeros_(self.cross.o.weight)
        with torch.no_grad():
            self.table[[2, 5]] = 1.0  # the gates

    def forward(self, x: Tensor, read: KeysValuesPair, signals: Signals, attention: AttentionFn) -> Tensor:
        """Return the latents' tokens `b n d` after the block, float32."""
        dtype = signals.dtype
        steer = (signals.modulation + at_use(self.table, x)).unsqueeze(2).unbind(1)  # six of b 1 d
        scale, shift, gate, mlp_scale, mlp_shift, mlp_gate = steer
        h = torch.addcmul(shift, layer_norm(x), 1 + scale).to(dtype)
        x = torch.addcmul(x, gate, self.attn(h, attention, signals.turn).float())
        x = x + self.cross(self.cross_norm(x).to(dtype), read, attention, signals.keep)
        h = torch.addcmul(mlp_shift, layer_norm(x), 1 + mlp_scale).to(dtype)
        return torch.addcmul(x, mlp_gate, self.mlp(h).float())


class DiffusionHead(nn.Module):
    """Velocity of noised latents, given what the trunk made of prompt, picture and latents."""

    def __init__(self, config: ExoConfig, *, ops: Ops, **where: Any) -> None:
        super().__init__()
        dim, hidden, device = config.diffusion_dim, config.hidden_size, where.get("device")
        self.patch, self.head_dim = config.diffusion_patch, config.diffusion_head_dim
        shape = {"kernel_size": self.patch, "stride": self.patch}
        self.embed = ops.conv2d(config.latent_channels, dim, **shape, **where)
        self.visual = ops.conv2d(config.feature_dim, dim, bias=False, **shape, **where)
        self.edit = ops.linear(hidden, dim, bias=False, **where)
        self.time = TimeMLP(dim, dim, ops=ops, **where)
        self.pool_norm = RMSNorm(hidden, device)
        self.pool = ops.linear(hidden, dim, **where)
        self.mod = ops.linear(dim, 6 * dim, **where)
        self.ctx_norms = nn.ModuleList(RMSNorm(hidden, device) for _ in config.context_layers)
        self.ctx = ops.linear(len(config.context_layers) * hidden, dim, **where)
        self.blocks = nn.ModuleList(Block(config, ops=ops, **where) for _ in range(config.diffusion_depth))
        self.out_mod = ops.linear(dim, 2 * dim, **where)
        self.out = ops.linear(dim, config.latent_channels * self.patch**2, **where)
        for layer in (self.mod, self.out):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def read(self, taps: Sequence[Tensor], dtype: torch.dtype) -> tuple[KeysValuesPair, ...]:
        """Return every block's keys and values of a part of the context: taps of the trunk, `b m k` each."""
        normed = [norm(tap).to(dtype) for norm, tap in zip(self.ctx_norms, taps, strict=True)]
        context = self.ctx(torch.cat(normed, dim=-1))  # b m d
        return tuple(block.cross.read(context) for block in self._typed_blocks())

    def forward(
        self,
        z: Tensor,
        t: Tensor,
        state: Tensor,
        *,
        edits: Tensor,
        features: Tensor | None,
        reads: Sequence[KeysValuesPair],
        keep: Tensor,
        runtime: Runtime,
    ) -> Tensor:
        """Return the velocity `b c h w` in the dtype of z, which matrices compute in.

        Args:
            z: noised latents `b c h w`.
            t: times `b`, 1 = noise.
            state: of the iteration's token, `b k`.
            edits: `b (hm wm) k`.
            features: of the picture, `b c h w`.
            reads: keys and values of the context for each block.
            keep: `b m`, which tokens of the context are there.
            runtime: the attention product; blocks are of the kind `diffusion`.
        """
        dtype, size = z.dtype, (z.shape[-2], z.shape[-1])
        x, grid = self._embed(z, edits, features)
        time = self.time(t, dtype) + self.pool(self.pool_norm(state).to(dtype))
        condition = functional.silu(time)  # b d
        signals = Signals(
            modulation=rearrange(self.mod(condition).float(), "b (six d) -> b six d", six=6),
            turn=position_rotation(grid_places(grid, z.device), (self.head_dim // 2,) * 2, _THETA),
            keep=keep[:, None, None],
            dtype=dtype,
        )
        for index, (block, read) in enumerate(zip(self._typed_blocks(), reads, strict=True)):
            call = partial(block, read=read, signals=signals, attention=runtime.attention)
            x = runtime.run_block("diffusion", index, call, x)
        scale, shift = self.out_mod(condition).float()[:, None].chunk(2, dim=-1)
        x = torch.addcmul(shift, layer_norm(x), 1 + scale).to(dtype)
        patches: Tensor = self.out(x)
        v = rearrange(patches, "b (h w) (c p q) -> b c (h p) (w q)", h=grid[0], p=self.patch, q=self.patch)
        return v[..., : size[0], : size[1]]

    def _embed(self, z: Tensor, edits: Tensor, features: Tensor | None) -> tuple[Tensor, tuple[int, int]]:
        """Return the tokens `b n d`, float32, and their grid."""
        size = (z.shape[-2], z.shape[-1])
        cells = self.embed(padded(z, self.patch))
        if features is not None:
            cells = cells + self.visual(padded(features, self.patch))
        grid = (cells.shape[-2], cells.shape[-1])
        # contiguous: compiled blocks have gradients that are not finite otherwise (torch 2.13, CPU)
        x: Tensor = rearrange(cells, "b d h w -> b (h w) d").float().contiguous()
        x = x + spread(self.edit(edits.to(z.dtype)), memory_grid(*size), size, self.patch)
        return x + position_features(grid, x.shape[-1], _REFERENCE, z.device), grid

    def _typed_blocks(self) -> Sequence[Block]:
        return cast("Sequence[Block]", self.blocks)
