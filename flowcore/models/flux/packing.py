"""Between grids of latents and FLUX.1's tokens: packing, positions, and the channels of the control models.

Source: black-forest-labs/flux, sampling.py.
"""

import torch
from einops import rearrange
from torch import Tensor

from ...errors import ShapeError

PATCH_SIZE = 2
"""Latents a side of a token in FLUX.1."""
TEXT_LENGTH = 512
"""Text tokens of FLUX.1 [dev]; [schnell] has half as many."""


def pack(latents: Tensor, patch_size: int = PATCH_SIZE) -> Tensor:
    """Return tokens `b (h w) (c p q)` of a grid `b c (h p) (w q)`, p = q = patch_size, rows first.

    Raises: ShapeError if a side is no multiple of the patch size.
    """
    if latents.ndim != 4 or any(side % patch_size for side in latents.shape[-2:]):
        raise ShapeError(
            f"latents must be b c h w with sides in steps of {patch_size}, got {tuple(latents.shape)}"
        )
    return rearrange(latents, "b c (h p) (w q) -> b (h w) (c p q)", p=patch_size, q=patch_size)


def unpack(tokens: Tensor, rows: int, columns: int, patch_size: int = PATCH_SIZE) -> Tensor:
    """Return the grid `b c (h p) (w q)` of tokens `b (h w) (c p q)`: the inverse of `pack`; rows = h."""
    return rearrange(
        tokens, "b (h w) (c p q) -> b c (h p) (w q)", h=rows, w=columns, p=patch_size, q=patch_size
    )


def grid_ids(rows: int, columns: int, index: int = 0, device: torch.device | str | None = None) -> Tensor:
    """Return the positions (index, row, column) of a grid of tokens, `1 (h w) 3` int64.

    index: 0 for the picture, 1 for the reference picture of FLUX.1 Kontext.
    """
    grid = torch.cartesian_prod(
        torch.tensor([index], device=device),
        torch.arange(rows, device=device),
        torch.arange(columns, device=device),
    )
    return grid[None]


def fill_control(masked: Tensor, mask: Tensor) -> Tensor:
    """Return what FLUX.1 Fill takes besides the noised latents, a grid `b (c + 64) h w`.

    Shapes: masked `b c h w`, latents of the picture with the masked part blank; mask `b 1 (8 h) (8 w)`, in
    pixels, 1 = to be filled.
    Raises: ShapeError if the mask does not have 8 x 8 pixels for each latent.
    """
    side = 8
    expected = (masked.shape[0], 1, side * masked.shape[2], side * masked.shape[3])
    if tuple(mask.shape) != expected:
        raise ShapeError(
            f"the mask must be {expected}, a square of pixels for each latent, got {tuple(mask.shape)}"
        )
    pixels = rearrange(mask, "b 1 (h p) (w q) -> b (p q) h w", p=side, q=side)
    return torch.cat((masked, pixels.to(masked.dtype)), dim=1)
