"""Grids over a picture: latents, and the memory whose cells cover 2 x 2 of them; and where cells lie."""

import math
from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional

CELL = 2
"""Latents on a side of a memory cell."""


def memory_grid(rows: int, columns: int) -> tuple[int, int]:
    """Return the memory grid of a latent grid; cells at the right and bottom may reach beyond it."""
    return math.ceil(rows / CELL), math.ceil(columns / CELL)


def padded(x: Tensor, multiple: int) -> Tensor:
    """Return `b c h w` grown at the right and bottom to a multiple, the last row and column repeating."""
    height, width = x.shape[-2:]
    if height % multiple == 0 and width % multiple == 0:
        return x
    return functional.pad(x, (0, -width % multiple, 0, -height % multiple), mode="replicate")


def on_grid(cells: Tensor, size: Sequence[int]) -> Tensor:
    """Return `b hm wm` of memory cells `b (hm wm)`, for latents of a size (h, w)."""
    return rearrange(cells, "b (h w) -> b h w", h=memory_grid(size[0], size[1])[0])


def spread(cells: Tensor, grid: tuple[int, int], size: tuple[int, int], patch: int) -> Tensor:
    """Return memory cells `b (hm wm) d` as tokens `b n d`, each token having what its cell has.

    grid: of the memory; size: of the latents; patch: latents on a side of a token.
    """
    rows, columns = (
        torch.arange(math.ceil(side / patch), device=cells.device) * patch // CELL for side in size
    )
    return cells[:, (rows[:, None] * grid[1] + columns).flatten()]


def position_features(grid: tuple[int, int], dim: int, reference: float, device: torch.device) -> Tensor:
    """Return [sin y, cos y, sin x, cos x] of the cells, `(h w) dim` float32, y and x times dim/4 frequencies.

    Coordinates count from the centre of the picture, whose size is `reference` whatever the grid.
    """
    rows, columns = grid
    scale = reference / math.sqrt(rows * columns)
    steps = torch.arange(dim // 4, dtype=torch.float32, device=device)
    frequencies = 1e4 ** (-steps / (dim // 4))
    y, x = (
        ((torch.arange(side, dtype=torch.float32, device=device) + 0.5 - side / 2) * scale)[:, None]
        * frequencies
        for side in (rows, columns)
    )
    down = torch.cat((y.sin(), y.cos()), dim=-1)[:, None].expand(-1, columns, -1)
    across = torch.cat((x.sin(), x.cos()), dim=-1)[None].expand(rows, -1, -1)
    return torch.cat((down, across), dim=-1).flatten(0, 1)


def grid_places(grid: tuple[int, int], device: torch.device) -> Tensor:
    """Return (row, column) of the cells, row by row, `1 (h w) 2`."""
    sides = [torch.arange(side, device=device) for side in grid]
    return torch.cartesian_prod(*sides)[None]
