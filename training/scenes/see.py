"""Finds the background and the flat parts of a picture, with colour, shape, size and place of each."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .draw import MIN_SIZE, extent, signed_distance, unit_area
from .errors import SceneError
from .scene import PALETTE, RADII, SHAPES

Bools = NDArray[np.bool_]
Floats = NDArray[np.float32]
Labels = NDArray[np.int32]

_FRAME = 3  # lengths in pixels of a 128 pixel picture
_EDGE = 3
_LEAST_AREA = 60
_SPECK_AREA = 4
_DIFFERENT = 45.0  # RGB distances
_PALETTE_REACH = 55.0
_UNIFORM_SHARE = 0.8
_GRID = 40
_GRID_REACH = 1.0  # half side of the grid for a part of area 1; the triangle needs 0.9
_LEAST_OVERLAP = 0.8
_MOST_STRETCH = 1.25
_PLACE_EDGE = 11 / 128
_RADIUS_RANGE = (0.75 * RADII["small"], 1.3 * RADII["large"])


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One connected part; lengths are fractions of the picture's shorter side, center of width and height.

    Attributes:
        rgb: Median colour of its inside.
        color, shape, size: Names, None where none fits.
        position: Name of the place of its bounding box's middle.
        overlap: Soft intersection over union with the best template.
    """

    rgb: tuple[float, float, float]
    color: str | None
    shape: str | None
    size: str | None
    position: str
    center: tuple[float, float]
    half_extent: tuple[float, float]
    overlap: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Sight:
    """What a picture shows; not clean if specks too small for a part add up to one."""

    background: str | None
    parts: tuple[Part, ...]
    is_clean: bool


def see(image: NDArray[np.uint8] | Image.Image) -> Sight:
    """What the picture shows, largest part first.

    Raises:
        SceneError: If the image is not RGB uint8 `h w 3` of at least 32 x 32 pixels.
    """
    pixels = _pixels(image)
    side = min(pixels.shape[:2])
    scale = side / 128
    ground, is_even = _background(pixels, max(1, round(_FRAME * scale)))
    labels, areas = label_parts(np.linalg.norm(pixels - ground, axis=2) > _DIFFERENT)
    least = _LEAST_AREA * scale**2
    order = [index for index in np.argsort(-areas, kind="stable") if areas[index] >= least]
    specks = areas[(areas < least) & (areas >= _SPECK_AREA * scale**2)].sum()
    parts = tuple(_part(pixels, ground, labels, int(index) + 1, side) for index in order)
    return Sight(
        background=_color_name(ground) if is_even else None,
        parts=parts,
        is_clean=bool(specks < least),
    )


def label_parts(mask: Bools) -> tuple[Labels, NDArray[np.int64]]:
    """Labels of the parts connected by edges, from 1 on with 0 outside, and the area of each in pixels."""
    height, width = mask.shape
    edges = np.diff(np.pad(mask.astype(np.int8), ((0, 0), (1, 1))), axis=1)
    rows, starts = np.nonzero(edges == 1)
    stops = np.nonzero(edges == -1)[1]
    roots = _join_runs(rows.tolist(), starts.tolist(), stops.tolist())
    names, numbers = np.unique(np.array(roots, dtype=np.int64), return_inverse=True)
    flat = np.zeros(height * width + 1, dtype=np.int32)
    np.add.at(flat, rows * width + starts, numbers + 1)
    np.subtract.at(flat, rows * width + stops, numbers + 1)
    labels = np.cumsum(flat[:-1], dtype=np.int32).reshape(height, width)
    return labels, np.bincount(numbers, weights=stops - starts, minlength=len(names)).astype(np.int64)


def _join_runs(rows: list[int], starts: list[int], stops: list[int]) -> list[int]:
    """Root of each run of set pixels, runs that touch in neighbouring rows joined (union-find)."""
    parents = list(range(len(rows)))

    def root(index: int) -> int:
        while parents[index] != index:
            parents[index] = parents[parents[index]]
            index = parents[index]
        return index

    above = 0
    for run, row in enumerate(rows):
        while rows[above] < row - 1 or (rows[above] == row - 1 and stops[above] <= starts[run]):
            above += 1
        other = above
        while rows[other] == row - 1 and starts[other] < stops[run]:
            parents[root(other)] = root(run)
            other += 1
    return [root(index) for index in range(len(rows))]


def _pixels(image: NDArray[np.uint8] | Image.Image) -> Floats:
    array = np.asarray(image.convert("RGB") if isinstance(image, Image.Image) else image)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
        raise SceneError(f"image must be uint8 of shape h w 3, got {array.dtype} of shape {array.shape}")
    if min(array.shape[:2]) < MIN_SIZE:
        raise SceneError(f"image must be at least {MIN_SIZE} pixels high and wide, got {array.shape[:2]}")
    return array.astype(np.float32)


def _background(pixels: Floats, frame: int) -> tuple[Floats, bool]:
    """Median colour of the frame, and whether the frame is flat enough to be called one colour."""
    inner = pixels[frame:-frame]
    sides = [pixels[:frame], pixels[-frame:], inner[:, :frame], inner[:, -frame:]]
    border = np.concatenate([side.reshape(-1, 3) for side in sides])
    ground = np.median(border, axis=0).astype(np.float32)
    share = np.mean(np.linalg.norm(border - ground, axis=1) <= _DIFFERENT)
    return ground, bool(share >= _UNIFORM_SHARE)


def _color_name(rgb: Floats) -> str | None:
    distances = {name: float(np.linalg.norm(rgb - np.array(color))) for name, color in PALETTE.items()}
    nearest = min(distances, key=distances.__getitem__)
    return nearest if distances[nearest] <= _PALETTE_REACH else None


def _erode(mask: Bools, steps: int) -> Bools:
    for _ in range(steps):
        wide = np.pad(mask, 1)
        mask = mask & wide[:-2, 1:-1] & wide[2:, 1:-1] & wide[1:-1, :-2] & wide[1:-1, 2:]
    return mask


def _part(pixels: Floats, ground: Floats, labels: Labels, label: int, side: int) -> Part:
    """Read one part from its crop, which reaches a little beyond it for the soft edge."""
    height, width = labels.shape
    edge = max(1, round(_EDGE * side / 128))
    rows, columns = np.nonzero(labels == label)
    top, left = max(0, int(rows.min()) - edge), max(0, int(columns.min()) - edge)
    window = (slice(top, int(rows.max()) + 1 + edge), slice(left, int(columns.max()) + 1 + edge))
    crop, mask = pixels[window], labels[window] == label
    is_near = ~_erode(~mask, edge) & (mask | (labels[window] == 0))
    coverage = _coverage(crop, ground, _median(crop[_core(mask, edge)])) * is_near
    inside = crop[_core((coverage >= 0.5) & mask, edge)]
    rgb = _median(inside)
    is_uniform = np.mean(np.linalg.norm(inside - rgb, axis=1) <= _DIFFERENT) >= _UNIFORM_SHARE
    coverage = _coverage(crop, ground, rgb) * is_near
    x0, x1, y0, y1 = _box((coverage >= 0.5) & mask)
    shape, overlap = _shape(coverage, (x1 - x0) / (y1 - y0))
    center = ((left + (x0 + x1) / 2) / width, (top + (y0 + y1) / 2) / height)
    half_extent = ((x1 - x0) / 2 / side, (y1 - y0) / 2 / side)
    radius = float(np.sqrt(coverage.sum() / unit_area(shape))) / side if shape else max(half_extent)
    return Part(
        rgb=(float(rgb[0]), float(rgb[1]), float(rgb[2])),
        color=_color_name(rgb) if is_uniform else None,
        shape=shape,
        size=_size(radius),
        position=position_of(*center),
        center=center,
        half_extent=half_extent,
        overlap=overlap,
    )


def _median(colors: Floats) -> Floats:
    return np.median(colors, axis=0).astype(np.float32)


def _core(mask: Bools, edge: int) -> Bools:
    """The mask without its edge, or with more of it where little would be left."""
    for steps in range(edge, 0, -1):
        core = _erode(mask, steps)
        if core.sum() * 6 >= mask.sum() > 0:
            return core
    return mask if mask.any() else np.ones_like(mask)


def _coverage(crop: Floats, ground: Floats, rgb: Floats) -> Floats:
    """How far each pixel lies on the way from the background's colour (0) to the part's (1)."""
    way = rgb - ground
    return np.clip((crop - ground) @ (way / max(float(way @ way), 1.0)), 0, 1).astype(np.float32)


def _box(solid: Bools) -> tuple[float, float, float, float]:
    """Left, right, top and bottom of a mask; of the whole crop if it is empty."""
    rows, columns = np.nonzero(solid.any(axis=1))[0], np.nonzero(solid.any(axis=0))[0]
    if not rows.size:
        return 0.0, float(solid.shape[1]), 0.0, float(solid.shape[0])
    return float(columns[0]), float(columns[-1] + 1), float(rows[0]), float(rows[-1] + 1)


def _shape(coverage: Floats, aspect: float) -> tuple[str | None, float]:
    """Best template by soft intersection over union, None if it overlaps too little or is stretched.

    The part is scaled to area 1 and moved by its centre of mass, both of which a soft edge leaves alone.
    """
    area = float(coverage.sum())
    if area < 1:
        return None, 0.0
    reach = float(np.sqrt(area)) * _GRID_REACH
    pad = int(reach) + 1
    x = float(coverage.sum(axis=0) @ (np.arange(coverage.shape[1]) + 0.5)) / area + pad
    y = float(coverage.sum(axis=1) @ (np.arange(coverage.shape[0]) + 0.5)) / area + pad
    found = np.asarray(
        Image.fromarray(np.pad(coverage, pad)).resize(
            (_GRID, _GRID), Image.Resampling.BILINEAR, box=(x - reach, y - reach, x + reach, y + reach)
        )
    )
    templates = _templates()
    overlaps = np.minimum(templates, found).sum(axis=(1, 2)) / np.maximum(templates, found).sum(axis=(1, 2))
    best = int(np.argmax(overlaps))
    half_width, half_height = extent(SHAPES[best])
    stretch = aspect / (half_width / half_height)
    is_fit = overlaps[best] >= _LEAST_OVERLAP and 1 / _MOST_STRETCH <= stretch <= _MOST_STRETCH
    return (SHAPES[best] if is_fit else None), float(overlaps[best])


@lru_cache(maxsize=1)
def _templates() -> Floats:
    """Coverage of each shape with area 1 and its centre of mass in the middle: `shapes grid grid`."""
    fine = 4
    axis = ((np.arange(_GRID * fine) + 0.5) / (_GRID * fine) * 2 - 1) * _GRID_REACH
    grids = []
    for shape in SHAPES:
        scale = np.sqrt(unit_area(shape))
        x, y = np.meshgrid(axis * scale, axis * scale)
        is_inside = signed_distance(shape, x, y) < 0
        is_inside = signed_distance(shape, x + x[is_inside].mean(), y + y[is_inside].mean()) < 0
        grids.append(is_inside.reshape(_GRID, fine, _GRID, fine).mean(axis=(1, 3)))
    return np.stack(grids).astype(np.float32)


def _size(radius: float) -> str | None:
    """Name of the size whose radius is nearest in ratio."""
    if not _RADIUS_RANGE[0] <= radius <= _RADIUS_RANGE[1]:
        return None
    return min(RADII, key=lambda name: abs(np.log(radius / RADII[name])))


def position_of(x: float, y: float) -> str:
    """Name of the place that a point lies in."""
    vertical = "top" if y < 0.5 - _PLACE_EDGE else "bottom" if y > 0.5 + _PLACE_EDGE else ""
    horizontal = "left" if x < 0.5 - _PLACE_EDGE else "right" if x > 0.5 + _PLACE_EDGE else ""
    return f"{vertical} {horizontal}".strip() or "center"
