from __future__ import annotations

import itertools

import numpy as np
import pytest

from training.scenes import PALETTE, SceneError, is_held_out, iterate_scenes, random_scene
from training.scenes.scene import POSITIONS, Scene, color_distance

HELD_OUT_OF_FORTY = [11, 13, 16, 30]  # of seed 5; another list would move pictures between training and test


def scenes(count: int, objects: str, split: str = "all") -> list[Scene]:
    return [scene for scene, _ in iterate_scenes(count, 5, objects=objects, split=split)]  # type: ignore[arg-type]


def test_palette_colors_lie_apart() -> None:
    assert len(PALETTE) == 10
    assert min(color_distance(*pair) for pair in itertools.combinations(PALETTE, 2)) > 105


@pytest.mark.parametrize("objects", ["one", "two"])
def test_objects_stay_inside_and_differ_from_the_background(objects: str) -> None:
    for scene in scenes(500, objects):
        for item in scene.objects:
            assert all(item.radius < middle < 1 - item.radius for middle in item.center)
            assert color_distance(item.color, scene.background) >= 120


def test_two_objects_lie_as_their_relation_says_with_a_gap() -> None:
    for scene in scenes(500, "two"):
        first, second = scene.objects
        axis = 0 if scene.relation == "left of" else 1
        gap = second.center[axis] - first.center[axis] - first.radius - second.radius
        assert gap > 6 / 128
        assert first.color != second.color
        assert first.position is None


def test_one_object_uses_all_positions() -> None:
    assert {scene.objects[0].position for scene in scenes(300, "one")} == set(POSITIONS)


@pytest.mark.parametrize("objects", ["one", "two"])
def test_a_tenth_of_the_meanings_is_held_out(objects: str) -> None:
    keys = {scene.key(): is_held_out(scene) for scene in scenes(4000, objects)}
    assert 0.085 < np.mean(list(keys.values())) < 0.115


def test_held_out_is_the_same_on_every_machine() -> None:
    flags = [is_held_out(scene) for scene in scenes(40, "mixed")]
    assert [index for index, flag in enumerate(flags) if flag] == HELD_OUT_OF_FORTY


@pytest.mark.parametrize("objects", ["one", "two", "mixed"])
def test_splits_share_no_meaning(objects: str) -> None:
    assert not any(map(is_held_out, scenes(200, objects, "train")))
    assert all(map(is_held_out, scenes(50, objects, "test")))


def test_unknown_words_are_refused() -> None:
    rng = np.random.default_rng(0)
    with pytest.raises(SceneError, match="objects must be one, two or mixed, got 'three'"):
        random_scene(rng, "three")  # type: ignore[arg-type]
    with pytest.raises(SceneError, match="split must be train, test or all, got 'dev'"):
        random_scene(rng, split="dev")  # type: ignore[arg-type]
