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
