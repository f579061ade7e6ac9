"""Rotary position embedding: pairs of neighbouring channels turned by position-dependent angles."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor


class Rotation(NamedTuple):
    """Cosine and sine of every pair's angle in float32, both broadcastable to `b nh n (e/2)`."""

    cos: Tensor
    sin: Tensor


def rotation(angles: Tensor) -> Rotation:
    """Return the rotation by angles in radians, computed in float32."""
    angles = angles.float()
    return Rotation(angles.cos(), angles.sin())


def axial_angles(positions: Tensor, frequencies: Tensor) -> Tensor:
    """Return position times frequency, axis by axis, in float32: pair number (frequency index) * axes + axis.

    Shapes: positions `b n a`; frequencies `nh f a`; result `b nh n (f a)`.
    """
    # A broadcast product, not a matrix product: autocast would compute the latter in half precision.
    places = rearrange(positions.float(), "b n a -> b 1 n 1 a")
    angles = places * rearrange(frequencies.float(), "nh f a -> nh 1 f a")
    return rearrange(angles, "b nh n f a -> b nh n (f a)")


def position_rotation(positions: Tensor, widths: Sequence[int], theta: float) -> Rotation:
    """Return the rotation at positions of several axes; each axis turns channels of its own.

    Axis i turns widths[i] channels, pair j of them by position * theta^(-2j / widths[i]). Angles are float64:
    the cosine of a large angle would show the rounding of float32.
    Shapes: positions `b n a` of any number type; cos and sin `b 1 n (e/2)`, e the sum of widths.
    """
    # A device without float64 has the table made on the CPU.
    place = "cpu" if positions.device.type == "mps" else positions.device
    exact = positions.to(place, torch.float64)
    frequencies = (
        theta ** (-torch.arange(0, width, 2, dtype=torch.float64, device=place) / width) for width in widths
    )
    angles = torch.cat([exact[..., i, None] * f for i, f in enumerate(frequencies)], dim=-1)[:, None]
    return Rotation(
        angles.cos().to(positions.device, torch.float32), angles.sin().to(positions.device, torch.float32)
    )


def rotate_pairs(x: Tensor, by: Rotation) -> Tensor:
    """Return x with channels (2q, 2q+1) turned by pair q's angle; channels beyond the last pair pass.

    Shapes: x `b nh n e`. The product is computed in float32, the result has the dtype of x.
    Source: Su et al. 2021, arXiv:2104.09864, eq. 15, interleaved form.
    """
    turned = 2 * by.cos.shape[-1]
    pairs = rearrange(x[..., :turned].float(), "b nh n (q two) -> b nh n q two", two=2)
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        # One complex product is several times faster here than four real ones.
        product = torch.view_as_complex(pairs.contiguous()) * torch.complex(by.cos, by.sin)
        result = torch.view_as_real(product).flatten(-2)
    else:
        first, second = pairs.unbind(-1)
        result = torch.stack(
            (first * by.cos - second * by.sin, first * by.sin + second * by.cos), dim=-1
        ).flatten(-2)
    result = result.to(x.dtype)
    return result if turned == x.shape[-1] else torch.cat((result, x[..., turned:]), dim=-1)
