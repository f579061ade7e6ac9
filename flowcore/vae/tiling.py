"""Large pictures in overlapping squares: memory is that of one square and of the result."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import TypeAlias

import torch
from torch import Tensor

from ..errors import ConfigError

TileCallback: TypeAlias = Callable[[int, int], object]
"""Told after each tile: how many are done, of how many."""

OVERLAP = 4
"""Tiles share this part of their side with the next one."""
_STEP = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiling:
    """When and how pictures are cut into tiles.

    side: of a tile in pixels; 0 = pictures are never cut. above: pixels of a picture that is not cut yet.
    """

    side: int = 512
    above: int = 2 * 1024**2

    def __post_init__(self) -> None:
        """Check that tiles hold whole latent cells, and overlap in whole ones. Raises: ConfigError."""
        if self.side % _STEP or self.side == _STEP or self.side < 0:
            raise ConfigError(
                f"the side of a tile must be 0 or a multiple of {_STEP} from {2 * _STEP} on, got {self.side}"
            )

    def cells(self, height: int, width: int, downscale: int) -> int | None:
        """Return the side of a tile in latent cells for a picture of that size, None if it is not cut."""
        is_cut = self.side and height * width > self.above and max(height, width) > self.side
        return self.side // downscale if is_cut else None


def tiling_of(side: int | None) -> Tiling:
    """Return tiles of that side for every picture that is larger; None = for large pictures alone."""
    return Tiling() if side is None else Tiling(side=side, above=0)


def in_tiles(
    function: Callable[[Tensor], Tensor],
    whole: Tensor,
    *,
    cells: int,
    before: int = 1,
    after: int = 1,
    callback: TileCallback | None = None,
) -> Tensor:
    """Return `function(whole)`, computed in tiles that fade into each other where they overlap.

    Args:
        function: `b c h w` -> `b d y x`, where every result depends mostly on what is near it.
        whole: `b c h w`, whose sides are multiples of `before`.
        cells: latent cells a side of a tile.
        before: elements a side of a latent cell in `whole`.
        after: elements a side of a latent cell in the result.
        callback: told of every tile.
    """
    sides = [whole.shape[axis] // before for axis in (2, 3)]
    tops, lefts = (_starts(side, cells) for side in sides)
    high, wide = (min(side, cells) for side in sides)
    rows, columns = (
        _weights(starts, side * after, min(side, cells) * after, after)
        for starts, side in zip((tops, lefts), sides, strict=True)
    )
    result: Tensor | None = None
    places = list(product(zip(tops, rows, strict=True), zip(lefts, columns, strict=True)))
    for number, ((top, row), (left, column)) in enumerate(places, start=1):
        tile = whole[:, :, top * before : (top + high) * before, left * before : (left + wide) * before]
        part = function(tile)
        if result is None:
            result = part.new_zeros(*part.shape[:2], sides[0] * after, sides[1] * after)
        region = (slice(top * after, (top + high) * after), slice(left * after, (left + wide) * after))
        result[:, :, region[0], region[1]] += part * row.to(part)[:, None] * column.to(part)
        if callback is not None:
            callback(number, len(places))
    assert result is not None
    return result


def _starts(side: int, cells: int) -> list[int]:
    """Return where the tiles of an axis start: the fewest that overlap enough, evenly spread."""
    if side <= cells:
        return [0]
    overlap = cells // OVERLAP
    count = -((overlap - side) // (cells - overlap))
    return [round(number * (side - cells) / (count - 1)) for number in range(count)]


def _weights(starts: list[int], side: int, length: int, after: int) -> list[Tensor]:
    """Return the weights of each tile along an axis, float32: linear ramps, of sum 1 at every element."""
    ramp = max(length // OVERLAP, 1)
    distance = torch.arange(length, dtype=torch.float32) + 0.5
    rising = (torch.minimum(distance, distance.flip(0)) / ramp).clamp(max=1)
    total = torch.zeros(side)
    for start in starts:
        total[start * after : start * after + length] += rising
    return [rising / total[start * after : start * after + length] for start in starts]
