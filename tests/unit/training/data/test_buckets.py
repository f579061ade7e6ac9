"""Bucket sizes, the choice among them, and how an image is brought to one."""

import math

import numpy as np
import pytest
from PIL import Image

from training.data.buckets import Bucket, bucket_sizes, crop_and_zoom, fit, nearest_bucket


@pytest.mark.parametrize(
    ("resolution", "multiple", "max_aspect"), [(256, 16, 2.0), (512, 64, 4.0), (32, 16, 1.0), (1024, 32, 2.5)]
)
def test_buckets_keep_their_promises(resolution: int, multiple: int, max_aspect: float) -> None:
    buckets = bucket_sizes(resolution, multiple, max_aspect)
    assert Bucket(resolution, resolution) in buckets
    assert len(set(buckets)) == len(buckets)
    for bucket in buckets:
        assert bucket.width % multiple == bucket.height % multiple == 0
        assert bucket.width * bucket.height <= resolution**2
        assert max(bucket.width / bucket.height, bucket.height / bucket.width) <= max_aspect
        assert Bucket(bucket.height, bucket.width) in buckets


def test_no_aspect_but_the_square_leaves_one_bucket() -> None:
    assert bucket_sizes(128, 16, 1.0) == [Bucket(128, 128)]


def test_buckets_of_a_small_case() -> None:
    sizes = {(b.width, b.height) for b in bucket_sizes(64, 16, 2.0)}
    assert sizes == {(64, 64), (80, 48), (48, 80)}


@pytest.mark.parametrize(
    ("size", "expected"),
    [((640, 640), (64, 64)), ((900, 540), (80, 48)), ((30, 50), (48, 80)), ((4000, 100), (80, 48))],
)
def test_the_bucket_of_the_nearest_aspect_is_taken(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert nearest_bucket(*size, bucket_sizes(64, 16, 2.0)) == Bucket(*expected)


def test_the_choice_does_not_depend_on_size() -> None:
    buckets = bucket_sizes(256, 16, 3.0)
    assert nearest_bucket(300, 200, buckets) == nearest_bucket(3000, 2000, buckets)


def test_an_image_of_the_bucket_s_size_is_left_alone() -> None:
    image = Image.effect_noise((48, 32), 80)
    assert fit(image, Bucket(48, 32)) is image


@pytest.mark.parametrize("size", [(100, 100), (31, 200), (47, 33), (8, 8), (49, 32)])
def test_any_image_gets_exactly_the_bucket_s_size(size: tuple[int, int]) -> None:
    assert fit(Image.new("RGB", size), Bucket(48, 32)).size == (48, 32)


def test_the_middle_of_the_image_is_kept() -> None:
    pixels = np.zeros((32, 96, 3), np.uint8)
    pixels[:, 32:64] = 255
    assert np.asarray(fit(Image.fromarray(pixels), Bucket(32, 32))).min() == 255


def test_crop_and_zoom_are_told() -> None:
    crop, zoom = crop_and_zoom(96, 32, Bucket(64, 64))
    assert math.isclose(crop, 2 / 3)
    assert zoom == 2
    assert crop_and_zoom(64, 64, Bucket(64, 64)) == (0, 1)
