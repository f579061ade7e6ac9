"""Which cells of a picture an edit changes, told by the latents before and after it."""

from torch import Tensor
from torch.nn import functional

from ...errors import ShapeError
from .grids import CELL, padded

LENGTH_WEIGHT = 0.1
"""Price of a cell that is marked: lambda of the edit loss."""


def cell_distances(source: Tensor, target: Tensor) -> Tensor:
    """Return the mean squared difference of each memory cell, `b hm wm`, of latents `b c h w`.

    Raises: ShapeError if the two have different shapes.
    """
    if source.ndim != 4 or source.shape != target.shape:
        raise ShapeError(
            f"source and target must be `b c h w` of one shape, got {tuple(source.shape)} and "
            f"{tuple(target.shape)}"
        )
    squares = (target.float() - source.float()).square().mean(dim=1, keepdim=True)
    return functional.avg_pool2d(padded(squares, CELL), CELL)[:, 0]


def changed_cells(source: Tensor, target: Tensor, weight: float = LENGTH_WEIGHT) -> Tensor:
    """Return the cells, `b hm wm` boolean, in which it pays to mark a change of latents `b c h w`.

    A mask m of a cell costs (1 - m)^2 D + weight * m; its best value is above 0 where D > weight / 2.
    Raises: as `cell_distances`.
    """
    return cell_distances(source, target) > weight / 2
