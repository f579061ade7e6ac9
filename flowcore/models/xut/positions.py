"""Where tokens lie: (y, x) coordinates in which the longer side of the image spans [-1, 1].

Source: KohakuBlueleaf/HDM, axial positions. The report normalises by area; its code by the longer side.
"""

import math

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional

from ...errors import ShapeError


def axial_positions(
    height: int,
    width: int,
    *,
    pixel_aspect: float = 1.0,
    align_corners: bool = False,
    device: torch.device | None = None,
) -> Tensor:
    """Return the cell centres of a height x width grid, float32, shape `(height width) 2`, rows first.

    pixel_aspect: height of a cell relative to its width.
    align_corners: the outermost values lie on the image's border, not half a cell inside.
    """
    aspect = width / (height * pixel_aspect)
    y = _spaced(min(1.0, 1.0 / aspect), height, align_corners, device)
    x = _spaced(min(1.0, aspect), width, align_corners, device)
    return rearrange(torch.stack(torch.meshgrid(y, x, indexing="ij"), dim=-1), "h w a -> (h w) a")


def _spaced(bound: float, count: int, align_corners: bool, device: torch.device | None) -> Tensor:
    """Return `count` positions across [-bound, bound]."""
    if align_corners:
        return torch.linspace(-bound, bound, count, device=device)
    edges = torch.linspace(-bound, bound, count + 1, device=device)
    return (edges[:-1] + edges[1:]) / 2


def cropped_positions(crop_top: int, crop_left: int, height: int, width: int) -> Tensor:
    """Return the positions of the square of side min(height, width) at an offset, `(side side) 2`.

    The positions are those of the uncropped image: a crop keeps its place in it (shifted square crop).
    """
    side = min(height, width)
    grid = rearrange(axial_positions(height, width), "(h w) a -> h w a", h=height)
    square = grid[crop_top : crop_top + side, crop_left : crop_left + side]
    return rearrange(square, "h w a -> (h w) a")


def camera_positions(
    height: int,
    width: int,
    *,
    patch_size: int = 2,
    zoom: float = 1.0,
    x_shift: float = 0.0,
    y_shift: float = 0.0,
) -> Tensor:
    """Return a position map for latents of height x width seen through a moved camera.

    Positive x_shift moves the view to the right, positive y_shift down; zoom above 1 moves closer.
    Shape: `1 (rows columns) 2`, rows and columns being height and width rounded up to the patch size.
    Raises: ShapeError if zoom is not positive.
    """
    if not zoom > 0:
        raise ShapeError(f"zoom must be above 0, got {zoom}")
    grid = axial_positions(_rounded_up(height, patch_size), _rounded_up(width, patch_size))
    return ((grid + torch.tensor([y_shift, x_shift])) / zoom)[None]


def _rounded_up(size: int, multiple: int) -> int:
    return size + -size % multiple


def pool_positions(pos_map: Tensor, rows: int, columns: int, patch_size: int) -> Tensor:
    """Return a latent-resolution map `b (h w) 2` at token resolution, `b (rows columns) 2`, float32.

    The anti-aliasing filter is cut off at the border, which moves the outermost tokens a little inwards: a
    neutral map is not the same as no map.
    """
    grid = rearrange(pos_map.float(), "b (h w) a -> b a h w", h=rows * patch_size)
    pooled = functional.interpolate(grid, (rows, columns), mode="bilinear", antialias=True)
    return rearrange(pooled, "b a h w -> b (h w) a")


def log_aspect(height: int, width: int) -> Tensor:
    """Return ln(width / height), float32, shape `1`: what `addon_info` holds in the published model."""
    return torch.tensor([math.log(width / height)], dtype=torch.float32)
