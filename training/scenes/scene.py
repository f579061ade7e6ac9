"""What a scene holds, how one is drawn at random, and which meanings are held out.

Lengths are fractions of the picture's side, measured on a 128 pixel picture; x runs right and y runs down.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal

import numpy as np

from .errors import SceneError

ObjectCount = Literal["one", "two", "mixed"]
Split = Literal["train", "test", "all"]
Rgb = tuple[int, int, int]

PALETTE: dict[str, Rgb] = {
    "red": (205, 20, 45),
    "green": (25, 150, 70),
    "blue": (30, 70, 220),
    "yellow": (250, 225, 50),
    "orange": (250, 120, 10),
    "purple": (125, 35, 165),
    "pink": (250, 145, 195),
    "cyan": (45, 205, 225),
    "white": (245, 245, 245),
    "black": (20, 20, 22),
}
SHAPES = ("circle", "square", "triangle", "diamond", "star", "cross")
RADII = {"small": 18 / 128, "medium": 26 / 128, "large": 36 / 128}
POSITIONS = (
    "top left",
    "top",
    "top right",
    "left",
    "center",
    "right",
    "bottom left",
    "bottom",
    "bottom right",
)
RELATIONS = ("left of", "above")
"""Relation of the first object to the second; captions also say them the other way round."""

CONTRAST = 120.0
"""Least RGB distance between an object and its background."""

_SIZE_PAIRS = (
    ("small", "small"),
    ("small", "medium"),
    ("medium", "small"),
    ("medium", "medium"),
    ("small", "large"),
    ("large", "small"),
)
_MARGIN = 3 / 128
_SHAKE = 2 / 128  # position jitter that no caption names
_REACH = 34 / 128  # farthest a grid place lies from the middle
_RADIUS_JITTER = 0.03
_COLOR_JITTER = 8
_GAP = (7 / 128, 10 / 128)
_HELD_OUT_PARTS = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class SceneObject:
    """One flat shape.

    Attributes:
        position: Name of its place, None in a scene of two objects.
        center: x and y of its bounding box's middle, fractions of the side.
        radius: Half the side of the square that it fits in, fraction of the side.
        rgb: Palette colour with its slight jitter.
    """

    shape: str
    color: str
    size: str
    position: str | None
    center: tuple[float, float]
    radius: float
    rgb: Rgb


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """One or two objects on a background; of two the first is left of or above the second."""

    background: str
    background_rgb: Rgb
    objects: tuple[SceneObject, ...]
    relation: str | None = None

    def key(self) -> str:
        """Text that is equal for scenes of equal meaning, whatever their jitter."""
        parts = [self.relation or "-", self.background]
        parts += [f"{item.shape}/{item.color}/{item.size}/{item.position or '-'}" for item in self.objects]
        return "|".join(parts)


def is_held_out(scene: Scene) -> bool:
    """Whether the scene's meaning belongs to the tenth that training never sees."""
    digest = hashlib.blake2b(scene.key().encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % _HELD_OUT_PARTS == 0


def random_scene(rng: np.random.Generator, objects: ObjectCount = "one", *, split: Split = "all") -> Scene:
    """A random scene.

    Args:
        rng: Source of all randomness.
        objects: One object, two, or either with equal chance.
        split: `test` draws held-out meanings only, `train` the others only.

    Raises:
        SceneError: If objects or split is none of the known words.
    """
    if objects not in ("one", "two", "mixed"):
        raise SceneError(f"objects must be one, two or mixed, got {objects!r}")
    if split not in ("train", "test", "all"):
        raise SceneError(f"split must be train, test or all, got {split!r}")
    is_two = objects == "two" or (objects == "mixed" and bool(rng.integers(2)))
    while True:
        scene = _two_objects(rng) if is_two else _one_object(rng)
        if split == "all" or is_held_out(scene) == (split == "test"):
            return scene


def color_distance(first: str, second: str) -> float:
    """Euclidean RGB distance of two palette colours."""
    return float(np.linalg.norm(np.subtract(PALETTE[first], PALETTE[second])))


def _pick(rng: np.random.Generator, items: tuple[str, ...]) -> str:
    return items[int(rng.integers(len(items)))]


def jitter_color(rng: np.random.Generator, color: str) -> Rgb:
    """A palette colour with a slight jitter, which no caption names."""
    shifts = rng.integers(-_COLOR_JITTER, _COLOR_JITTER + 1, size=3)
    red, green, blue = (
        min(255, max(0, value + int(shift))) for value, shift in zip(PALETTE[color], shifts, strict=True)
    )
    return red, green, blue


def _jitter_radius(rng: np.random.Generator, size: str) -> float:
    return RADII[size] * float(rng.uniform(1 - _RADIUS_JITTER, 1 + _RADIUS_JITTER))


def _shake(rng: np.random.Generator) -> float:
    return float(rng.uniform(-_SHAKE, _SHAKE))


def _pick_background(rng: np.random.Generator, colors: tuple[str, ...]) -> str:
    return _pick(
        rng,
        tuple(name for name in PALETTE if all(color_distance(name, color) >= CONTRAST for color in colors)),
    )


def place(position: str, size: str) -> tuple[float, float]:
    """Middle of a named place, x and y; small objects lie farther out than large ones, which must fit."""
    reach = min(_REACH, 0.5 - _MARGIN - _SHAKE - RADII[size] * (1 + _RADIUS_JITTER))
    x = 0.5 + reach * (("right" in position) - ("left" in position))
    y = 0.5 + reach * (("bottom" in position) - ("top" in position))
    return x, y


def _one_object(rng: np.random.Generator) -> Scene:
    color = _pick(rng, tuple(PALETTE))
    size = _pick(rng, tuple(RADII))
    position = _pick(rng, POSITIONS)
    background = _pick_background(rng, (color,))
    x, y = place(position, size)
    item = SceneObject(
        shape=_pick(rng, SHAPES),
        color=color,
        size=size,
        position=position,
        center=(x + _shake(rng), y + _shake(rng)),
        radius=_jitter_radius(rng, size),
        rgb=jitter_color(rng, color),
    )
    return Scene(background=background, background_rgb=jitter_color(rng, background), objects=(item,))


def _two_objects(rng: np.random.Generator) -> Scene:
    relation = _pick(rng, RELATIONS)
    sizes = _SIZE_PAIRS[int(rng.integers(len(_SIZE_PAIRS)))]
    colors = tuple(str(name) for name in rng.choice(tuple(PALETTE), size=2, replace=False))
    background = _pick_background(rng, colors)
    radii = tuple(_jitter_radius(rng, size) for size in sizes)
    gap = float(rng.uniform(*_GAP))
    length = 2 * sum(radii) + gap
    slack = (1 - length) / 2 - _MARGIN
    start = (1 - length) / 2 + float(rng.uniform(-1, 1)) * min(slack, _SHAKE)
    along = (start + radii[0], start + 2 * radii[0] + gap + radii[1])
    items = []
    for index, size in enumerate(sizes):
        across = 0.5 + _shake(rng)
        center = (along[index], across) if relation == "left of" else (across, along[index])
        items.append(
            SceneObject(
                shape=_pick(rng, SHAPES),
                color=colors[index],
                size=size,
                position=None,
                center=center,
                radius=radii[index],
                rgb=jitter_color(rng, colors[index]),
            )
        )
    return Scene(
        background=background,
        background_rgb=jitter_color(rng, background),
        objects=tuple(items),
        relation=relation,
    )
