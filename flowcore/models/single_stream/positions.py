"""Where image tokens lie, as turns of queries and keys; text tokens are not turned.

Source: Particle1904/SingleStreamDiT_T5Gemma2, model.py; Su et al. 2021, arXiv:2104.09864.
"""

from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional


class HalfRotation(NamedTuple):
    """Turns of a head's two halves against each other: cosine and signed sine `n 1 e`, float32."""

    cos: Tensor
    sin: Tensor

    def last(self, count: int) -> "HalfRotation":
        """Return the turns of the last tokens alone."""
        return HalfRotation(self.cos[-count:], self.sin[-count:])


def grid_angles(
    rows: int, columns: int, head_dim: int, base: float, device: torch.device | None = None
) -> Tensor:
    """Return the angles `(rows columns) (e/2)` in radians of a grid's tokens, float32.

    The first half turns with the row, the second with the column, both counted from the top left corner:
    frequency k of either is base^(-4k / e). Nothing depends on the size of the grid.
    """
    steps = torch.arange(head_dim // 4, dtype=torch.float32, device=device)
    frequencies = base ** (-4 * steps / head_dim)
    row, column = (
        torch.arange(count, dtype=torch.float32, device=device)[:, None] * frequencies
        for count in (rows, columns)
    )  # h (e/4), w (e/4)
    angles = torch.cat((row[:, None].expand(-1, columns, -1), column[None].expand(rows, -1, -1)), dim=-1)
    return rearrange(angles, "h w a -> (h w) a")


def joint_rotation(angles: Tensor, num_text: int) -> HalfRotation:
    """Return the turns of num_text text tokens, none, and of the image tokens at these angles `n (e/2)`."""
    cos, sin = angles.cos(), angles.sin()
    rotation = torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)  # n e
    cos, sin = (
        functional.pad(part, (0, 0, num_text, 0), value=still)[:, None]
        for part, still in zip(rotation, (1.0, 0.0), strict=True)
    )  # (m + n) 1 e
    return HalfRotation(cos, sin)


def rotate_halves(x: Tensor, by: HalfRotation) -> Tensor:
    """Return x `b n nh e` with channels i and i + e/2 turned by angle i, in float32."""
    return torch.addcmul(x * by.cos, x.roll(x.shape[-1] // 2, dims=-1), by.sin)
