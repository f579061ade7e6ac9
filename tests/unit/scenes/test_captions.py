from __future__ import annotations

import re

import numpy as np
import pytest

from training.scenes import (
    Meaning,
    MeantObject,
    Scene,
    SceneError,
    SceneObject,
    caption_scene,
    captions_held_out,
    is_held_out,
    iterate_scenes,
    parse_caption,
    plain_caption,
    random_scene,
)
from training.scenes.captions import vocabulary


def is_true(meaning: Meaning, scene: Scene) -> bool:
    """Whether everything that the caption names is so in the scene."""
    return (
        meaning.relation == scene.relation
        and meaning.background in {None, scene.background}
        and len(meaning.objects) == len(scene.objects)
        and all(
            (meant.shape, meant.color) == (item.shape, item.color)
            and meant.size in {None, item.size}
            and meant.position in {None, item.position}
            for meant, item in zip(meaning.objects, scene.objects, strict=True)
        )
    )


@pytest.mark.parametrize("objects", ["one", "two"])
def test_parsing_inverts_every_caption(objects: str) -> None:
    for scene, caption in iterate_scenes(2000, 11, objects=objects, split="all"):  # type: ignore[arg-type]
        assert is_true(parse_caption(caption), scene), caption


@pytest.mark.parametrize("objects", ["one", "two"])
def test_complete_captions_name_everything(objects: str) -> None:
    for index in range(300):
        rng = np.random.default_rng([1, index])
        scene = random_scene(rng, objects)  # type: ignore[arg-type]
        meaning = parse_caption(caption_scene(scene, rng, is_complete=True))
        assert meaning.background == scene.background
        assert [(item.size, item.position) for item in meaning.objects] == [
            (item.size, item.position) for item in scene.objects
        ]


@pytest.mark.parametrize("objects", ["one", "two"])
def test_plain_captions_name_everything_and_the_left_or_upper_object_first(objects: str) -> None:
    for index in range(300):
        rng = np.random.default_rng([1, index])
        scene = random_scene(rng, objects)  # type: ignore[arg-type]
        caption = plain_caption(scene)
        assert parse_caption(caption) == parse_caption(caption_scene(scene, rng, is_complete=True))
        first = scene.objects[0]
        assert caption.split()[1:4] == [first.size, first.color, first.shape]


def test_attributes_are_mostly_named() -> None:
    meanings = [parse_caption(caption) for _, caption in iterate_scenes(1000, 2, objects="one")]
    for named in (
        [bool(meaning.background) for meaning in meanings],
        [bool(meaning.objects[0].size) for meaning in meanings],
        [bool(meaning.objects[0].position) for meaning in meanings],
    ):
        assert 0.85 < np.mean(named) < 0.95


def test_words_are_few_plain_and_all_in_use() -> None:
    captions = [caption for _, caption in iterate_scenes(3000, 0, objects="mixed")]
    used = {word for caption in captions for word in caption.split()}
    assert used == set(vocabulary())
    assert len(used) < 80
    assert all(re.fullmatch("[a-z]+( [a-z]+)*", caption) for caption in captions)


def test_the_shown_forms_parse() -> None:
    red, blue = MeantObject(shape="circle", color="red"), MeantObject(shape="square", color="blue")
    assert parse_caption("a red circle left of a blue square") == Meaning(
        objects=(red, blue), relation="left of"
    )
    assert parse_caption("A blue square, right of a red circle.") == Meaning(
        objects=(red, blue), relation="left of"
    )
    star = MeantObject(shape="star", color="green", size="large")
    cross = MeantObject(shape="cross", color="yellow", size="small")
    assert parse_caption("a large green star above a small yellow cross on a white background") == Meaning(
        objects=(star, cross), relation="above", background="white"
    )
    corner = MeantObject(shape="circle", color="red", size="small", position="top left")
    assert parse_caption("a small red circle at the top left on a blue background") == Meaning(
        objects=(corner,), background="blue"
    )


def test_the_plain_relation_form_is_generated() -> None:
    captions = [caption for _, caption in iterate_scenes(2000, 0, objects="two")]
    assert any(re.fullmatch(r"an? \w+ \w+ left of an? \w+ \w+", caption) for caption in captions)


@pytest.mark.parametrize(
    ("caption", "reason"),
    [
        ("a photo of a cat", "word 'photo' is unknown"),
        ("red a circle", "the words are in no known order"),
        ("", "the words are in no known order"),
        ("a red circle at the left above a blue square", "the words are in no known order"),
        ("a red circle on a blue background on a blue background", "the words are in no known order"),
    ],
)
def test_other_text_is_refused_with_an_example(caption: str, reason: str) -> None:
    with pytest.raises(SceneError, match=re.escape(reason)) as caught:
        parse_caption(caption)
    assert "write one like 'a red circle left of a blue square'" in str(caught.value)


@pytest.mark.parametrize("objects", ["one", "two"])
def test_held_out_captions_occur_in_no_training_set(objects: str) -> None:
    captions = captions_held_out(200, 4, objects)  # type: ignore[arg-type]
    assert captions == captions_held_out(200, 4, objects)  # type: ignore[arg-type]
    assert captions != captions_held_out(200, 5, objects)  # type: ignore[arg-type]
    trained = {caption for _, caption in iterate_scenes(3000, 4, objects=objects, split="train")}  # type: ignore[arg-type]
    assert not trained & set(captions)


def scene_of(meaning: Meaning) -> Scene:
    """A scene of a complete meaning, its looks left blank."""
    items = tuple(
        SceneObject(
            shape=item.shape,
            color=item.color,
            size=str(item.size),
            position=item.position,
            center=(0.5, 0.5),
            radius=0.1,
            rgb=(0, 0, 0),
        )
        for item in meaning.objects
    )
    return Scene(
        background=str(meaning.background), background_rgb=(0, 0, 0), objects=items, relation=meaning.relation
    )


@pytest.mark.parametrize("objects", ["one", "two", "mixed"])
def test_held_out_captions_name_held_out_meanings(objects: str) -> None:
    captions = captions_held_out(300, 0, objects)  # type: ignore[arg-type]
    assert all(is_held_out(scene_of(parse_caption(caption))) for caption in captions)


def test_unusable_numbers_are_refused() -> None:
    with pytest.raises(SceneError, match="count must be at least 1, got 0"):
        captions_held_out(0, 1)
    with pytest.raises(SceneError, match="seed must be 0 or more, got -1"):
        captions_held_out(1, -1)
