"""Pictures of samples, to look at them: dots for points, lines for curves and series, stripes for symbols."""

import colorsys

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageDraw
from torch import Tensor

from ..images import tensor_to_images
from .codecs import Codec, Fourier, Points, Series, Symbols

_MARGIN = 0.08
_BACKGROUND, _LINE = (255, 255, 255), (160, 160, 160)


def draw_samples(codec: Codec, samples: Tensor, side: int = 512) -> list[Image.Image]:
    """Return a picture, `side` pixels a side, for each of a codec's samples `b ...`; all in one scale.

    Points show their first two coordinates, x to the right and y up, colored in their order from red over
    green and blue back to red. Pictures are stretched to the square; of grids with other than one or three
    channels, which are no pictures, the first three show over their own range.
    """
    values = samples.detach().float().cpu()
    if isinstance(codec, Points | Fourier):
        return [_dots(codec, sample, side) for sample in _to_square(_in_plane(values))]
    if isinstance(codec, Series):
        moments = torch.linspace(0, 1, values.shape[1]).expand(values.shape[0], -1)
        heights = _to_square(rearrange(values, "b n c -> b (n c) 1"))[..., 0]
        lines = rearrange(heights, "b (n c) -> b c n", c=values.shape[2])
        return [_lines(x, series, side) for x, series in zip(moments, lines, strict=True)]
    if isinstance(codec, Symbols):
        return [_stripes(codec.size, sample, side) for sample in values]
    images = tensor_to_images(_colors(values))
    return [image.resize((side, side), Image.Resampling.NEAREST) for image in images]


def _in_plane(points: Tensor) -> Tensor:
    """Return points `b n 2` of those of any number of coordinates."""
    if points.shape[-1] == 1:
        return torch.cat((points, torch.zeros_like(points)), dim=-1)
    return points[..., :2]


def _to_square(points: Tensor) -> Tensor:
    """Return `b n a` moved and scaled, alike for all, so that every coordinate lies in [0, 1]."""
    low, high = points.amin(dim=(0, 1)), points.amax(dim=(0, 1))
    size = (high - low).max().clamp(min=1e-6)
    return (points - (low + high) / 2) / size + 0.5


def _pixels(x: Tensor, y: Tensor, side: int) -> list[tuple[float, float]]:
    """Return places on the canvas of coordinates in [0, 1], y upwards."""
    inner = side * (1 - 2 * _MARGIN)
    places = torch.stack((x, 1 - y), dim=-1) * inner + side * _MARGIN
    return [(float(column), float(row)) for column, row in places]


def _dots(codec: Points | Fourier, points: Tensor, side: int) -> Image.Image:
    canvas = Image.new("RGB", (side, side), _BACKGROUND)
    brush = ImageDraw.Draw(canvas)
    places = _pixels(points[:, 0], points[:, 1], side)
    if isinstance(codec, Fourier):
        brush.line([*places, places[0]], fill=_LINE, width=max(1, side // 256))
    is_ordered = isinstance(codec, Fourier) or codec.is_ordered
    radius = side / 80
    for index, (x, y) in enumerate(places):
        color = _hue(index / len(places)) if is_ordered else _hue(0.6)
        brush.ellipse((x - radius, y - radius, x + radius, y + radius), fill=color)
    return canvas


def _lines(moments: Tensor, channels: Tensor, side: int) -> Image.Image:
    canvas = Image.new("RGB", (side, side), _BACKGROUND)
    brush = ImageDraw.Draw(canvas)
    for index, heights in enumerate(channels):
        color = _hue(index / len(channels))
        brush.line(_pixels(moments, heights, side), fill=color, width=max(1, side // 128))
    return canvas


def _stripes(size: int, symbols: Tensor, side: int) -> Image.Image:
    row = np.array([_hue(float(symbol) / size) for symbol in symbols], dtype=np.uint8)[None]
    return Image.fromarray(row).resize((side, side), Image.Resampling.NEAREST)


def _colors(grids: Tensor) -> Tensor:
    """Return pictures `b 3 h w` in [-1, 1] of grids `b c h w`."""
    count = grids.shape[1]
    if count in (1, 3):
        return grids.expand(-1, 3, -1, -1)
    shown = grids[:, [0, 1, min(2, count - 1)]]
    low, high = shown.amin(dim=(0, 2, 3), keepdim=True), shown.amax(dim=(0, 2, 3), keepdim=True)
    return (shown - low) / (high - low).clamp(min=1e-6) * 2 - 1


def _hue(share: float) -> tuple[int, int, int]:
    red, green, blue = colorsys.hsv_to_rgb(share, 0.85, 0.85)
    return round(red * 255), round(green * 255), round(blue * 255)
