from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from training.scenes import (
    SHAPES,
    Scene,
    SceneError,
    SceneObject,
    Verdict,
    accuracy,
    draw,
    iterate_scenes,
    judge,
)
from training.scenes.see import label_parts, see

COUNT = 120
Pixels = NDArray[np.uint8]


def pairs(objects: str, count: int = COUNT) -> list[tuple[Image.Image, str]]:
    return [
        (draw(scene), caption) for scene, caption in iterate_scenes(count, 21, objects=objects, split="all")
    ]  # type: ignore[arg-type]


def single(**changes: object) -> Scene:
    """A red circle in the middle of a white picture."""
    item = SceneObject(
        shape="circle",
        color="red",
        size="medium",
        position="center",
        center=(0.5, 0.5),
        radius=26 / 128,
        rgb=(205, 20, 45),
    )
    objects = (replace(item, **changes),)  # type: ignore[arg-type]
    return Scene(background="white", background_rgb=(245, 245, 245), objects=objects)


CAPTION = "a medium red circle in the center on a white background"


def wrong(verdict: Verdict) -> set[str]:
    return {name for name, value in verdict.items() if value is False}


@pytest.mark.parametrize("objects", ["one", "two"])
def test_true_pictures_are_right(objects: str) -> None:
    shares = accuracy(judge(*pair) for pair in pairs(objects, 400))
    assert shares["all"] is not None
    assert shares["all"] >= 0.995


@pytest.mark.parametrize("size", [64, 256])
def test_other_sizes_are_right(size: int) -> None:
    scenes = iterate_scenes(100, 22, objects="mixed", split="all")
    shares = accuracy(judge(draw(scene, size), caption) for scene, caption in scenes)
    assert shares["all"] is not None
    assert shares["all"] >= 0.98


@pytest.mark.parametrize("objects", ["one", "two"])
def test_softly_blurred_pictures_are_right_and_strongly_blurred_ones_lose_their_shape(objects: str) -> None:
    def blurred(radius: float) -> dict[str, float | None]:
        return accuracy(
            judge(image.filter(ImageFilter.GaussianBlur(radius)), caption)
            for image, caption in pairs(objects)
        )

    soft, strong = blurred(0.8), blurred(4.0)
    assert soft["all"] is not None
    assert soft["all"] >= 0.99
    assert strong["shape"] is not None
    assert strong["shape"] < 0.4


@pytest.mark.parametrize("objects", ["one", "two"])
def test_faint_noise_is_tolerated_and_strong_noise_is_not(objects: str) -> None:
    rng = np.random.default_rng(0)

    def noisy(strength: float) -> dict[str, float | None]:
        return accuracy(
            judge(
                np.clip(np.asarray(image) + rng.normal(0, strength, (128, 128, 3)), 0, 255).astype(np.uint8),
                caption,
            )
            for image, caption in pairs(objects)
        )

    assert noisy(8)["all"] == 1
    assert noisy(60)["all"] == 0


@pytest.mark.parametrize("objects", ["one", "two"])
def test_captions_of_other_pictures_fall_to_chance(objects: str) -> None:
    made = pairs(objects, 600)
    shares = accuracy(judge(image, made[index - 7][1]) for index, (image, _) in enumerate(made))
    chance = {
        "color": 0.1,
        "background": 0.1,
        "shape": 1 / 6,
        "position": 1 / 9,
        "size": 1 / 3,
        "relation": 0.25,
    }
    if objects == "two":
        chance |= {"color": 1 / 45, "shape": 1 / 20, "size": 1 / 4}
    for name, limit in chance.items():
        assert shares[name] is None or shares[name] <= limit + 0.04, name  # type: ignore[operator]
    assert shares["all"] is not None
    assert shares["all"] <= 0.002


@pytest.mark.parametrize(
    ("changes", "attribute"),
    [
        ({"rgb": (30, 70, 220)}, "color"),
        ({"rgb": (128, 128, 128)}, "color"),
        ({"shape": "square"}, "shape"),
        ({"shape": "star"}, "shape"),
        ({"radius": 18 / 128}, "size"),
        ({"radius": 36 / 128}, "size"),
        ({"radius": 9 / 128}, "size"),
        ({"center": (0.3, 0.5)}, "position"),
        ({"center": (0.5, 0.75)}, "position"),
    ],
)
def test_one_wrong_attribute_is_found_alone(changes: dict[str, object], attribute: str) -> None:
    assert wrong(judge(draw(single()), CAPTION)) == set()
    assert wrong(judge(draw(single(**changes)), CAPTION)) == {attribute, "all"}


def test_wrong_background_is_found() -> None:
    scene = replace(single(), background_rgb=(45, 205, 225))
    assert wrong(judge(draw(scene), CAPTION)) == {"background", "all"}


def test_mirrored_and_turned_pictures_have_the_wrong_relation() -> None:
    for scene, caption in iterate_scenes(50, 3, objects="two"):
        pixels = np.asarray(draw(scene))
        mirrored = np.ascontiguousarray(pixels[:, ::-1] if scene.relation == "left of" else pixels[::-1])
        verdict = judge(mirrored, caption)
        assert verdict["relation"] is False
        assert verdict["color"] is True
        turned = np.ascontiguousarray(np.rot90(pixels))
        assert judge(turned, caption)["relation"] is False


def test_objects_of_swapped_colors_are_wrong() -> None:
    caption = "a red circle left of a blue square"
    scene, _ = next(iter(iterate_scenes(1, 3, objects="two")))
    first, second = scene.objects
    looks = replace(
        scene,
        relation="left of",
        background_rgb=(245, 245, 245),
        objects=(
            replace(first, shape="circle", rgb=(30, 70, 220), center=(0.25, 0.5), radius=0.16),
            replace(second, shape="square", rgb=(205, 20, 45), center=(0.75, 0.5), radius=0.16),
        ),
    )
    assert judge(draw(looks), caption)["all"] is False


def blob(rng: np.random.Generator, strength: float) -> Pixels:
    """A red blob: a circle of radius 26 whose radius wavers with the angle."""
    y, x = np.mgrid[:128, :128] - 63.5
    angle = np.arctan2(y, x)
    waves = sum(rng.normal(0, strength) * np.cos(k * angle + rng.uniform(0, 7)) for k in range(2, 7))
    coverage = np.clip(26 * (1 + waves) - np.hypot(x, y) + 0.5, 0, 1)[..., None]
    return (coverage * (205, 20, 45) + (1 - coverage) * (245, 245, 245)).astype(np.uint8)


def test_blobs_are_no_shape() -> None:
    rng = np.random.default_rng(0)
    named = [part.shape for _ in range(200) for part in see(blob(rng, 0.2)).parts if part.shape]
    assert len(named) <= 10


@pytest.mark.parametrize("shape", SHAPES)
def test_stretched_shapes_are_none(shape: str) -> None:
    image = draw(single(shape=shape)).resize((256, 128)).crop((64, 0, 192, 128))
    assert [part.shape for part in see(image).parts] == [None]


def test_stray_parts_and_specks_make_the_picture_wrong() -> None:
    pixels = np.array(draw(single()))
    stray = pixels.copy()
    stray[5:15, 5:15] = (30, 70, 220)
    assert {"color", "shape", "size", "position", "all"} == wrong(judge(stray, CAPTION))
    specks = pixels.copy()
    for column in range(5, 120, 10):
        specks[5:8, column : column + 3] = (30, 70, 220)
    assert "all" in wrong(judge(specks, CAPTION))
    dust = pixels.copy()
    dust[5, 5] = (30, 70, 220)
    assert judge(dust, CAPTION)["all"] is True


def test_empty_and_flat_pictures_are_wrong_without_an_error() -> None:
    for value in (0, 245):
        assert judge(np.full((128, 128, 3), value, dtype=np.uint8), CAPTION)["all"] is False


def test_two_colored_part_has_no_color() -> None:
    pixels = np.array(draw(single()))
    is_object = np.linalg.norm(pixels - np.array([245.0, 245, 245]), axis=2) > 100
    is_object[:, 62:] = False
    pixels[is_object] = (30, 70, 220)
    assert judge(pixels, CAPTION)["color"] is False


def test_unnamed_attributes_are_none() -> None:
    verdict = judge(draw(single()), "a red circle")
    assert verdict == {
        "color": True,
        "background": None,
        "shape": True,
        "position": None,
        "size": None,
        "relation": None,
        "all": True,
    }


def test_accuracy_counts_named_attributes_only() -> None:
    verdicts = [judge(draw(single()), caption) for caption in (CAPTION, "a red circle", "a large red circle")]
    shares = accuracy(verdicts)
    assert shares["size"] == 0.5
    assert shares["all"] == pytest.approx(2 / 3)
    assert shares["relation"] is None
    assert accuracy([])["all"] is None


def test_parts_are_labelled_by_edges() -> None:
    mask = np.array([[1, 1, 0, 1], [0, 0, 0, 1], [1, 0, 1, 1], [1, 0, 0, 0]], dtype=bool)
    labels, areas = label_parts(mask)
    assert sorted(areas) == [2, 2, 4]
    assert labels[0, 3] == labels[2, 2]
    assert labels[0, 0] != labels[0, 3]
    assert (labels > 0).tolist() == mask.tolist()
    spiral = np.array([[1, 1, 1], [1, 0, 1], [1, 0, 1], [0, 0, 1], [1, 1, 1]], dtype=bool)
    assert label_parts(spiral)[1].tolist() == [spiral.sum()]
    assert label_parts(np.zeros((3, 3), dtype=bool))[1].size == 0


@pytest.mark.parametrize("seed", range(5))
def test_labels_equal_a_flood_fill(seed: int) -> None:
    mask = np.random.default_rng(seed).random((24, 31)) < 0.6
    labels, areas = label_parts(mask)
    for label, area in enumerate(areas, start=1):
        region = labels == label
        grown = np.zeros_like(region)
        grown.flat[np.flatnonzero(region)[0]] = True
        for _ in range(mask.size):
            wide = np.pad(grown, 1)
            grown = mask & (wide[:-2, 1:-1] | wide[2:, 1:-1] | wide[1:-1, :-2] | wide[1:-1, 2:] | grown)
        assert (grown == region).all()
        assert area == region.sum()


def test_unusable_images_are_refused() -> None:
    with pytest.raises(SceneError, match="image must be uint8 of shape h w 3, got float64"):
        judge(np.zeros((128, 128, 3)), CAPTION)  # type: ignore[arg-type]
    with pytest.raises(SceneError, match="image must be at least 32 pixels"):
        judge(np.zeros((16, 128, 3), dtype=np.uint8), CAPTION)
