"""Draws scenes with anti-aliased edges from the exact distance of each pixel to the outline."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .errors import SceneError
from .scene import Scene

Floats = NDArray[np.float64]

MIN_SIZE = 32
_CIRCLE = 0.95  # radius of the circle in the square from -1 to 1
_STAR_OUTER, _STAR_INNER = 1.05, 0.49


def _star() -> Floats:
    turns = np.arange(10) * np.pi / 5
    lengths = np.where(np.arange(10) % 2 == 0, _STAR_OUTER, _STAR_INNER)
    points = np.stack([lengths * np.sin(turns), -lengths * np.cos(turns)], axis=1)
    middle = (points.max(axis=0) + points.min(axis=0)) / 2  # of the bounding box
    return np.asarray(points - middle, dtype=np.float64)


def _cross(arm: float) -> Floats:
    return np.array(
        [
            (-arm, -1), (arm, -1), (arm, -arm), (1, -arm), (1, arm), (arm, arm),
            (arm, 1), (-arm, 1), (-arm, arm), (-1, arm), (-1, -arm), (-arm, -arm),
        ],
        dtype=np.float64,
    )  # fmt: skip


_POLYGONS: dict[str, Floats] = {
    "square": np.array([(-0.86, -0.86), (0.86, -0.86), (0.86, 0.86), (-0.86, 0.86)]),
    "triangle": np.array([(0.0, -0.9), (1.0, 0.9), (-1.0, 0.9)]),
    "diamond": np.array([(0.0, -1.0), (1.0, 0.0), (0.0, 1.0), (-1.0, 0.0)]),
    "star": _star(),
    "cross": _cross(0.36),
}


def draw(scene: Scene, size: int = 128) -> Image.Image:
    """The scene as an RGB picture of size x size pixels.

    Raises:
        SceneError: If size is below 32 pixels.
    """
    if size < MIN_SIZE:
        raise SceneError(f"size must be at least {MIN_SIZE} pixels, got {size}")
    pixels = np.empty((size, size, 3))
    pixels[:] = scene.background_rgb
    axis = (np.arange(size) + 0.5) / size
    for item in scene.objects:
        x, y = ((axis - middle) / item.radius for middle in item.center)
        distance = signed_distance(item.shape, *np.meshgrid(x, y)) * item.radius * size  # pixels
        coverage = np.clip(0.5 - distance, 0, 1)[..., None]
        pixels += coverage * (np.array(item.rgb) - pixels)
    return Image.fromarray(np.rint(pixels).astype(np.uint8))


def signed_distance(shape: str, x: Floats, y: Floats) -> Floats:
    """Distance to the outline of a shape of radius 1 about the origin, negative inside.

    Args:
        shape: One of `SHAPES`.
        x: Coordinates to the right.
        y: Coordinates downwards, of the shape of x.
    """
    if shape == "circle":
        return np.asarray(np.hypot(x, y) - _CIRCLE)
    corners = _POLYGONS[shape]
    nearest = np.full(x.shape, np.inf)
    is_inside = np.zeros(x.shape, dtype=bool)
    for (ax, ay), (bx, by) in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        dx, dy = bx - ax, by - ay
        along = np.clip(((x - ax) * dx + (y - ay) * dy) / (dx * dx + dy * dy), 0, 1)
        nearest = np.minimum(nearest, np.hypot(x - ax - along * dx, y - ay - along * dy))
        if dy != 0:
            crosses = (y >= ay) != (y >= by)
            is_inside ^= crosses & (x < ax + (y - ay) * dx / dy)
    return np.where(is_inside, -nearest, nearest)


def extent(shape: str) -> tuple[float, float]:
    """Half width and half height of a shape of radius 1."""
    if shape == "circle":
        return _CIRCLE, _CIRCLE
    half_width, half_height = np.abs(_POLYGONS[shape]).max(axis=0)
    return float(half_width), float(half_height)


def unit_area(shape: str) -> float:
    """Area of a shape of radius 1."""
    if shape == "circle":
        return float(np.pi * _CIRCLE**2)
    x, y = _POLYGONS[shape].T
    return float(abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) / 2)
