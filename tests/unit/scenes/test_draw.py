from __future__ import annotations

import numpy as np
import pytest

from training.scenes import SHAPES, Scene, SceneError, SceneObject, draw, random_scene
from training.scenes.draw import extent, signed_distance, unit_area


def one(shape: str, radius: float = 0.25) -> Scene:
    item = SceneObject(
        shape=shape,
        color="white",
        size="medium",
        position="center",
        center=(0.5, 0.5),
        radius=radius,
        rgb=(255,) * 3,
    )
    return Scene(background="black", background_rgb=(0, 0, 0), objects=(item,))


@pytest.mark.parametrize("shape", SHAPES)
def test_drawn_area_is_the_shape_s_area(shape: str) -> None:
    drawn = np.asarray(draw(one(shape)), dtype=np.float64)[..., 0].sum() / 255
    assert drawn == pytest.approx(unit_area(shape) * 32**2, rel=0.01)


@pytest.mark.parametrize("shape", SHAPES)
def test_extent_bounds_the_shape(shape: str) -> None:
    axis = np.linspace(-1.2, 1.2, 481)
    x, y = np.meshgrid(axis, axis)
    is_inside = signed_distance(shape, x, y) <= 0
    half_width, half_height = extent(shape)
    assert np.abs(x[is_inside]).max() == pytest.approx(half_width, abs=0.01)
    assert np.abs(y[is_inside]).max() == pytest.approx(half_height, abs=0.01)
    assert max(half_width, half_height) <= 1


def test_distance_to_a_square_is_exact() -> None:
    x, y = np.array([0.0, 1.86, 0.86, 0.86 + 3]), np.array([0.0, 0.0, 0.0, 0.86 + 4])
    assert signed_distance("square", x, y) == pytest.approx([-0.86, 1.0, 0.0, 5.0])


def test_edges_are_soft_and_the_rest_is_flat() -> None:
    values = np.asarray(draw(one("circle")))[..., 0]
    soft = ((values > 0) & (values < 255)).sum()
    assert 100 < soft < 300  # a ring of one pixel about a circle of 30 pixels radius
    assert values[64, 64] == 255
    assert values[0, 0] == 0


@pytest.mark.parametrize("size", [32, 96, 256])
def test_any_size_shows_the_same_scene(size: int) -> None:
    scene = random_scene(np.random.default_rng(3), "two")
    picture = draw(scene, size)
    assert picture.size == (size, size)
    assert picture.mode == "RGB"
    shrunk = np.asarray(draw(scene, 256).resize((64, 64)), dtype=float)
    assert np.abs(np.asarray(picture.resize((64, 64)), dtype=float) - shrunk).mean() < 6


def test_too_small_a_picture_is_refused() -> None:
    with pytest.raises(SceneError, match="size must be at least 32 pixels, got 31"):
        draw(one("star"), 31)
