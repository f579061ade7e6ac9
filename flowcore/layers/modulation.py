"""Shift, scale and gate that a condition vector gives to a sub-layer."""

from typing import NamedTuple

from torch import Tensor


class Modulation(NamedTuple):
    """The three vectors `b 1 d` of a sub-layer in float32; 1 is the neutral scale and gate."""

    scale: Tensor
    shift: Tensor
    gate: Tensor


def modulation(raw: Tensor) -> Modulation:
    """Return the modulation of a head's output `b 1 (3 d)`: scale - 1, shift, gate - 1 in this order."""
    scale, shift, gate = raw.float().chunk(3, dim=-1)
    return Modulation(scale=scale + 1, shift=shift, gate=gate + 1)
