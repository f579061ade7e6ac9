"""Between a grid of latents and a row of tokens."""

import torch
from einops import rearrange
from torch import Tensor


def pad_to_multiple(x: Tensor, multiple: int) -> Tensor:
    """Return `b c h w` grown at the right and bottom to a multiple, the image repeating from its start."""
    height, width = x.shape[-2:]
    if height % multiple:
        rows = torch.arange(height + -height % multiple, device=x.device) % height
        x = x.index_select(-2, rows)
    if width % multiple:
        columns = torch.arange(width + -width % multiple, device=x.device) % width
        x = x.index_select(-1, columns)
    return x


def unpatchify(tokens: Tensor, rows: int, columns: int, patch_size: int) -> Tensor:
    """Return tokens `b (rows columns) (p q c)` as a grid `b c (rows p) (columns q)`, p = q = patch_size."""
    return rearrange(
        tokens,
        "b (h w) (p q c) -> b c (h p) (w q)",
        h=rows,
        w=columns,
        p=patch_size,
        q=patch_size,
    )


def cells_to_tokens(cells: Tensor, size: tuple[int, int], patch_size: int) -> tuple[Tensor, tuple[int, int]]:
    """Return tokens `b (rows columns) (p q c)` of a grid's cells `b (h w) c`, and their rows and columns.

    size: (h, w), grown to multiples of patch_size = p = q as in `pad_to_multiple`.
    """
    if patch_size == 1:
        return cells, size
    grid = pad_to_multiple(rearrange(cells, "b (h w) c -> b c h w", h=size[0]), patch_size)
    tokens = rearrange(grid, "b c (h p) (w q) -> b (h w) (p q c)", p=patch_size, q=patch_size)
    return tokens, (grid.shape[2] // patch_size, grid.shape[3] // patch_size)


def tokens_to_cells(tokens: Tensor, grid: tuple[int, int], size: tuple[int, int], patch_size: int) -> Tensor:
    """Return the cells `b (h w) c` of tokens, the inverse of `cells_to_tokens`; grid: rows and columns."""
    if patch_size == 1:
        return tokens
    latents = unpatchify(tokens, *grid, patch_size)[..., : size[0], : size[1]]
    return rearrange(latents, "b c h w -> b (h w) c")
