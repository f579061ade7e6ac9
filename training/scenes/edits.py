"""Edits of scenes: what is asked of a picture in words, and the scene that it then shows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from .captions import caption_scene, plain_caption
from .scene import (
    CONTRAST,
    PALETTE,
    POSITIONS,
    RADII,
    SHAPES,
    ObjectCount,
    Scene,
    SceneObject,
    Split,
    color_distance,
    is_held_out,
    jitter_color,
    place,
    random_scene,
)
from .see import position_of

KINDS = ("color", "background", "shape", "size", "position", "remove")
_LEARNED = (*KINDS, "color", "remove", "remove")
"""Kinds to learn from: more of those that are hardest to say, and of removals, which need two objects."""

_TEMPLATES = {
    "color": ("make {object} {value}", "turn {object} {value}", "paint {object} {value}"),
    "background": (
        "make the background {value}",
        "turn the background {value}",
        "change the background to {value}",
    ),
    "shape": ("turn {object} into a {value}", "change {object} into a {value}", "make {object} a {value}"),
    "size": ("make {object} {value}",),
    "position": ("move {object} to the {value}", "put {object} at the {value}"),
    "remove": ("remove {object}", "delete {object}", "erase {object}"),
}
_CAPTION_SHARE = 0.1
_COLOR_SHARE = 0.5
_STREAM = 0xED17


@dataclass(frozen=True, slots=True, kw_only=True)
class Edit:
    """What is asked of a source scene; in the target all else is as it was, to the pixel.

    Attributes:
        kind: One of `KINDS`.
        instruction: What is to change, which says all that the target needs beside the source.
        caption: Plain caption of the target: nothing in it is chance.
        subject: What is asked to change, as the instruction names it; of an object also the word behind it in
            the source's caption, which tells the first of two from the second.
    """

    kind: str
    source: Scene
    target: Scene
    instruction: str
    caption: str
    subject: str

    @property
    def answer(self) -> str:
        """What a model says that answers in words: what the source shows, what is to change, what it becomes.

        A line for each: so it looks first, then finds in its words what it is asked to change, and then knows
        what to copy and what not. The last line leaves out where the object is that is left of two: not in
        one of the places that have names, so the name of the nearest is a guess, and the source shows it.
        """
        target = plain_caption(self.target, names_place=self.kind != "remove")
        return f"{plain_caption(self.source)}\n{self.subject}\n{target}"


@dataclass(frozen=True, slots=True)
class _Change:
    """The changed scene, and the word for what is new in it."""

    target: Scene
    value: str = ""


def random_edit(rng: np.random.Generator, objects: ObjectCount = "mixed", *, split: Split = "all") -> Edit:
    """A random edit of a random scene.

    Args:
        rng: Source of all randomness.
        objects: Objects of the source.
        split: `train` draws edits whose source and target are no held-out meanings, the harder kinds more
            often; `test` those with a held-out target.

    Raises:
        SceneError: If objects or split is none of the known words.
    """
    is_learned = split == "train"
    while True:
        source = random_scene(rng, objects, split="train" if is_learned else "all")
        kind = _pick(rng, _LEARNED if is_learned else KINDS)
        index = int(rng.integers(len(source.objects)))
        change = _CHANGES[kind](source, index, rng)
        if change and (split == "all" or is_held_out(change.target) == (split == "test")):
            template, name = _pick(rng, _TEMPLATES[kind]), _name(source, index, rng)
            return Edit(
                kind=kind,
                source=source,
                target=change.target,
                instruction=template.format(object=name, value=change.value),
                caption=plain_caption(change.target),
                subject="the background" if kind == "background" else f"{name} {_following(source, index)}",
            )


def iterate_edits(
    count: int, seed: int, *, objects: ObjectCount = "mixed", split: Split = "train"
) -> Iterator[tuple[Edit, str]]:
    """Edits, each with its text; number i depends on seed and i alone, not on count.

    The text is the instruction, for a tenth of the edits a caption of the target; not in the test split.
    """
    for index in range(count):
        rng = np.random.default_rng([_STREAM, seed, index])
        edit = random_edit(rng, objects, split=split)
        is_caption = split != "test" and rng.random() < _CAPTION_SHARE
        yield edit, caption_scene(edit.target, rng, is_complete=True) if is_caption else edit.instruction


def _pick(rng: np.random.Generator, items: tuple[str, ...]) -> str:
    return items[int(rng.integers(len(items)))]


def _name(scene: Scene, index: int, rng: np.random.Generator) -> str:
    """What the instruction calls an object; its colour is named where its shape does not tell."""
    item = scene.objects[index]
    is_told = sum(other.shape == item.shape for other in scene.objects) == 1
    with_color = rng.random() < _COLOR_SHARE or not is_told
    return f"the {item.color} {item.shape}" if with_color else f"the {item.shape}"


def _following(scene: Scene, index: int) -> str:
    """The word behind an object in the plain caption of its scene."""
    words = plain_caption(scene).split()
    named = [place for place, word in enumerate(words) if word in SHAPES]
    return words[named[index] + 1]


def _with_object(scene: Scene, index: int, item: SceneObject) -> Scene:
    objects = tuple(item if i == index else other for i, other in enumerate(scene.objects))
    return replace(scene, objects=objects)


def _change_color(scene: Scene, index: int, rng: np.random.Generator) -> _Change | None:
    used = {item.color for item in scene.objects}
    names = tuple(c for c in PALETTE if c not in used and color_distance(c, scene.background) >= CONTRAST)
    if not names:
        return None
    color = _pick(rng, names)
    item = replace(scene.objects[index], color=color, rgb=jitter_color(rng, color))
    return _Change(_with_object(scene, index, item), color)


def _change_background(scene: Scene, index: int, rng: np.random.Generator) -> _Change | None:
    del index
    names = tuple(
        color
        for color in PALETTE
        if color != scene.background
        and all(color_distance(color, item.color) >= CONTRAST for item in scene.objects)
    )
    if not names:
        return None
    color = _pick(rng, names)
    return _Change(replace(scene, background=color, background_rgb=jitter_color(rng, color)), color)


def _change_shape(scene: Scene, index: int, rng: np.random.Generator) -> _Change:
    item = scene.objects[index]
    shape = _pick(rng, tuple(name for name in SHAPES if name != item.shape))
    return _Change(_with_object(scene, index, replace(item, shape=shape)), shape)


def _change_size(scene: Scene, index: int, rng: np.random.Generator) -> _Change | None:
    """Another size; of two objects, between which there is no room to grow, a smaller one."""
    item = scene.objects[index]
    is_alone = item.position is not None
    names = tuple(
        name
        for name, radius in RADII.items()
        if name != item.size and (is_alone or radius < RADII[item.size])
    )
    if not names:
        return None
    size = _pick(rng, names)
    radius = item.radius * RADII[size] / RADII[item.size]
    resized = replace(_placed(item, item.position, size), size=size, radius=radius)
    return _Change(_with_object(scene, index, resized), size)


def _change_position(scene: Scene, index: int, rng: np.random.Generator) -> _Change | None:
    item = scene.objects[index]
    if item.position is None:
        return None
    position = _pick(rng, tuple(name for name in POSITIONS if name != item.position))
    moved = replace(_placed(item, position, item.size), position=position)
    corner = " corner" if " " in position and rng.integers(2) else ""
    return _Change(_with_object(scene, index, moved), position + corner)


def _placed(item: SceneObject, position: str | None, size: str) -> SceneObject:
    """The object at another place, or where another size has the same place, as far beside it as before."""
    if item.position is None or position is None:
        return item
    (old_x, old_y), (new_x, new_y) = place(item.position, item.size), place(position, size)
    return replace(item, center=(item.center[0] + new_x - old_x, item.center[1] + new_y - old_y))


def _remove(scene: Scene, index: int, rng: np.random.Generator) -> _Change | None:
    """One of two objects less; the other stays, and its caption names where that is."""
    del rng
    if len(scene.objects) == 1:
        return None
    left = scene.objects[1 - index]
    alone = replace(left, position=position_of(*left.center))
    return _Change(replace(scene, objects=(alone,), relation=None))


_CHANGES: dict[str, Callable[[Scene, int, np.random.Generator], _Change | None]] = {
    "color": _change_color,
    "background": _change_background,
    "shape": _change_shape,
    "size": _change_size,
    "position": _change_position,
    "remove": _remove,
}
