"""Captions of scenes in a small vocabulary, and the parser that inverts them."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from .errors import SceneError
from .scene import PALETTE, POSITIONS, SHAPES, ObjectCount, Scene, SceneObject, random_scene

_SIZE_WORDS = {"small": ("small", "little"), "medium": ("medium",), "large": ("large", "big")}
_RELATION_WORDS = {
    "left of": ("left of", "to the left of"),
    "above": ("above", "over"),
    "right of": ("right of", "to the right of"),
    "below": ("below", "under"),
}
_OPPOSITE = {"left of": "right of", "above": "below"}
_MIRRORED = {"right of": "left of", "below": "above"}


def _position_phrases(position: str) -> tuple[str, ...]:
    if position == "center":
        return "in the center", "in the middle"
    if " " in position:
        return f"at the {position}", f"in the {position}", f"in the {position} corner"
    if position in ("left", "right"):
        return f"at the {position}", f"on the {position}"
    return f"at the {position}", f"at the {position} center"


_POSITION_PHRASES = {position: _position_phrases(position) for position in POSITIONS}
_SIZE_OF = {word: size for size, words in _SIZE_WORDS.items() for word in words}
_POSITION_OF = {phrase: name for name, phrases in _POSITION_PHRASES.items() for phrase in phrases}
_RELATION_OF = {phrase: name for name, phrases in _RELATION_WORDS.items() for phrase in phrases}

# {object} is an object or two in relation; a blank template slot vanishes with its blank
_ONE_TEMPLATES: tuple[str, ...] = (
    "{object} {position} {background}",
    "{object} {position} {background}",
    "{object} {background} {position}",
    "{background} {object} {position}",
    "{position} {object} {background}",
)
_TWO_TEMPLATES: tuple[str, ...] = ("{object} {background}", "{object} {background}", "{background} {object}")
_GROUND_FIRST = "{ground} with {object} {position}"

_NAMED_ONE = {"size": 0.9, "position": 0.9, "background": 0.9}
_NAMED_TWO = {"size": 0.6, "background": 0.8}
_GROUND_FIRST_SHARE = 0.15
_HELD_OUT_STREAM = 0x7E57


@dataclass(frozen=True, slots=True, kw_only=True)
class MeantObject:
    """An object as a caption names it; None where the caption is silent."""

    shape: str
    color: str
    size: str | None = None
    position: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Meaning:
    """What a caption says; of two objects the first is the one left of or above the other."""

    objects: tuple[MeantObject, ...]
    background: str | None = None
    relation: str | None = None


def caption_scene(scene: Scene, rng: np.random.Generator, *, is_complete: bool = False) -> str:
    """A caption of the scene in randomly chosen words.

    Args:
        scene: What to describe.
        rng: Source of the choice of words and of what is left out.
        is_complete: Name size, position and background always, so that the caption belongs to one meaning.
    """
    chances = _NAMED_TWO if scene.relation else _NAMED_ONE

    def is_named(attribute: str) -> bool:
        return is_complete or bool(rng.random() < chances[attribute])

    if scene.relation:
        content, position = _relation_phrase(scene, rng, is_sized=is_named("size")), ""
    else:
        (item,) = scene.objects
        content = _object_phrase(item, _size_word(item, rng, is_sized=is_named("size")))
        position = _choose(rng, _POSITION_PHRASES[item.position or "center"]) if is_named("position") else ""
    ground = _ground_phrase(scene) if is_named("background") else ""
    template = _choose(rng, _TWO_TEMPLATES if scene.relation else _ONE_TEMPLATES)
    if ground and rng.random() < _GROUND_FIRST_SHARE:
        template = _GROUND_FIRST
    background = f"on {ground}" if ground else ""
    filled = template.format(object=content, position=position, background=background, ground=ground)
    return " ".join(filled.split())


def plain_caption(scene: Scene, *, names_place: bool = True) -> str:
    """The one complete caption of all scenes of a meaning; of two objects the left or upper is first.

    names_place: also where an object is that is alone.
    """
    objects = [_object_phrase(item, item.size) for item in scene.objects]
    content = f" {scene.relation} ".join(objects)
    if names_place and not scene.relation:
        content += f" {_POSITION_PHRASES[scene.objects[0].position or 'center'][0]}"
    return f"{content} on {_ground_phrase(scene)}"


def captions_held_out(count: int, seed: int, objects: ObjectCount = "one") -> list[str]:
    """Complete captions of held-out meanings, in no training set; the stream is apart from that of `write`.

    Raises:
        SceneError: If count is below 1 or seed is negative.
    """
    if count < 1:
        raise SceneError(f"count must be at least 1, got {count}")
    if seed < 0:
        raise SceneError(f"seed must be 0 or more, got {seed}")
    captions = []
    for index in range(count):
        rng = np.random.default_rng([_HELD_OUT_STREAM, seed, index])
        captions.append(caption_scene(random_scene(rng, objects, split="test"), rng, is_complete=True))
    return captions


def vocabulary() -> tuple[str, ...]:
    """All words that captions use, sorted."""
    phrases = [*_SIZE_OF, *_POSITION_OF, *_RELATION_OF, *PALETTE, *SHAPES, "a an on with background"]
    return tuple(sorted({word for phrase in phrases for word in phrase.split()}))


def parse_caption(caption: str) -> Meaning:
    """What the caption says. Upper case, commas and a full stop at the end are ignored.

    Raises:
        SceneError: If the caption is not one that scenes have.
    """
    words = " ".join(caption.lower().replace(",", " ").rstrip(" .\n").split())
    for pattern in _PATTERNS:
        match = pattern.fullmatch(words)
        if match:
            return _meaning(match.groupdict())
    raise SceneError(_unparsed(caption, words))


def _choose(rng: np.random.Generator, items: tuple[str, ...]) -> str:
    return items[int(rng.integers(len(items)))]


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def _size_word(item: SceneObject, rng: np.random.Generator, *, is_sized: bool) -> str:
    return _choose(rng, _SIZE_WORDS[item.size]) if is_sized else ""


def _object_phrase(item: SceneObject, size: str) -> str:
    words = [word for word in (size, item.color, item.shape) if word]
    return " ".join([_article(words[0]), *words])


def _ground_phrase(scene: Scene) -> str:
    return f"{_article(scene.background)} {scene.background} background"


def _relation_phrase(scene: Scene, rng: np.random.Generator, *, is_sized: bool) -> str:
    relation = scene.relation or "left of"
    first, second = (_object_phrase(item, _size_word(item, rng, is_sized=is_sized)) for item in scene.objects)
    if rng.integers(2):
        relation, first, second = _OPPOSITE[relation], second, first
    return f"{first} {_choose(rng, _RELATION_WORDS[relation])} {second}"


def _one_of(name: str, phrases: tuple[str, ...]) -> str:
    longest_first = sorted(phrases, key=len, reverse=True)
    return f"(?P<{name}>{'|'.join(map(re.escape, longest_first))})"


def _object_pattern(index: int) -> str:
    size, color, shape = (f"{name}{index}" for name in ("size", "color", "shape"))
    return (
        f"an? (?:{_one_of(size, tuple(_SIZE_OF))} )?{_one_of(color, tuple(PALETTE))} {_one_of(shape, SHAPES)}"
    )


def _patterns() -> tuple[re.Pattern[str], ...]:
    """One expression a template, with optional slots that take the blank beside them along."""
    ground = f"an? {_one_of('background', tuple(PALETTE))} background"
    position = _one_of("position", tuple(_POSITION_OF))
    pair = f"{_object_pattern(0)} {_one_of('relation', tuple(_RELATION_OF))} {_object_pattern(1)}"
    patterns = []
    for templates, content in ((_ONE_TEMPLATES, _object_pattern(0)), (_TWO_TEMPLATES, pair)):
        for template in (*dict.fromkeys(templates), _GROUND_FIRST):
            before, after = template.split("{object}")
            before = before.replace("{ground}", ground)
            before = before.replace("{background} ", f"(?:on {ground} )?")
            before = before.replace("{position} ", f"(?:{position} )?")
            after = after.replace(" {background}", f"(?: on {ground})?")
            after = after.replace(" {position}", "" if content == pair else f"(?: {position})?")
            patterns.append(re.compile(before + content + after))
    return tuple(patterns)


def _meaning(groups: dict[str, str | None]) -> Meaning:
    objects = []
    for index in range(2 if "shape1" in groups else 1):
        shape, color, size = (groups[f"{name}{index}"] for name in ("shape", "color", "size"))
        position = groups.get("position")
        objects.append(
            MeantObject(
                shape=str(shape),
                color=str(color),
                size=_SIZE_OF[size] if size else None,
                position=_POSITION_OF[position] if position else None,
            )
        )
    words = groups.get("relation")
    relation = _RELATION_OF[words] if words else None
    if relation in _MIRRORED:
        relation = _MIRRORED[relation]
        objects.reverse()
    return Meaning(objects=tuple(objects), background=groups.get("background"), relation=relation)


def _unparsed(caption: str, words: str) -> str:
    known = set(vocabulary())
    shown = caption if len(caption) <= 80 else caption[:77] + "..."
    unknown = [word for word in words.split() if word not in known]
    reason = f"word {unknown[0]!r} is unknown" if unknown else "the words are in no known order"
    example = "a red circle left of a blue square"
    return f"caption must describe a scene, got {shown!r} ({reason}); write one like {example!r}"


_PATTERNS = _patterns()
