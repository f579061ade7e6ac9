"""Captions of scenes with one word changed: what tells whether a model hears its text."""

from __future__ import annotations

import numpy as np

from .scene import PALETTE, SHAPES

SIZES = ("small", "medium", "large")
SWAPS: dict[str, tuple[tuple[str, ...], ...]] = {
    "color": (tuple(PALETTE),),
    "background": (tuple(PALETTE),),
    "shape": (SHAPES,),
    "size": (SIZES,),
    "position": (("left", "right"), ("top", "bottom")),
}
"""Kinds of words, each with the groups within which one stands for another."""


def swap_word(caption: str, kind: str, rng: np.random.Generator) -> str | None:
    """The caption with another word of a kind of `SWAPS`, one that it does not hold; None if it has none.

    The word of a background is the color before "background"; "left of" and its like are no positions.
    """
    words = caption.split()
    places = [(i, group) for i in range(len(words)) for group in SWAPS[kind] if _is_of(words, i, kind, group)]
    if not places:
        return None
    place, group = places[int(rng.integers(len(places)))]
    others = [word for word in group if word not in words]
    if not others:
        return None
    words[place] = others[int(rng.integers(len(others)))]
    if place and words[place - 1] in ("a", "an"):
        words[place - 1] = "an" if words[place][0] in "aeiou" else "a"
    return " ".join(words)


def _is_of(words: list[str], place: int, kind: str, group: tuple[str, ...]) -> bool:
    following = words[place + 1] if place + 1 < len(words) else ""
    if words[place] not in group or (kind == "position" and following == "of"):
        return False
    return (following == "background") == (kind == "background")
