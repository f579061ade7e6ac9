"""Captions with one word changed."""

import re

import numpy as np
import pytest

from training.scenes import captions_held_out, parse_caption
from training.scenes.swaps import SWAPS, swap_word

CASES = [
    ("color", "a red circle on a blue background", r"an? (?!red|blue)\w+ circle on a blue background"),
    ("background", "a red circle on a blue background", r"a red circle on an? (?!red|blue)\w+ background"),
    ("shape", "a red circle", r"a red (?!circle)\w+"),
    ("size", "a large red circle", r"a (small|medium) red circle"),
    ("position", "a red circle at the left", "a red circle at the right"),
    ("position", "a red star left of a blue star at the top", "a red star left of a blue star at the bottom"),
]


@pytest.mark.parametrize(("kind", "caption", "expected"), CASES)
def test_one_word_is_changed(kind: str, caption: str, expected: str) -> None:
    for seed in range(20):
        found = swap_word(caption, kind, np.random.default_rng(seed))
        assert found is not None
        assert re.fullmatch(expected, found), found


def test_changed_captions_are_captions_of_other_scenes() -> None:
    rng = np.random.default_rng(0)
    for caption in captions_held_out(40, 1, "mixed"):
        for kind in SWAPS:
            other = swap_word(caption, kind, rng)
            if other is not None:
                assert parse_caption(other) != parse_caption(caption)


def test_without_such_a_word_there_is_none() -> None:
    rng = np.random.default_rng(0)
    assert swap_word("a red circle", "position", rng) is None
    assert swap_word("a red circle left of a blue star", "position", rng) is None
    assert swap_word("left right", "position", rng) is None
