"""Picture sizes from a list of aspect ratios."""

import pytest

from training.data.buckets import Bucket
from training.data.ratio_buckets import nearest_ratio, place, ratio_buckets


def test_sizes_of_the_published_run() -> None:
    sizes = [(bucket.width, bucket.height) for bucket in ratio_buckets(448)]
    assert sizes == [(448, 448), (384, 512), (512, 384)]
    assert len(ratio_buckets(512)) == 3
    assert len(ratio_buckets(544)) == 9


@pytest.mark.parametrize("resolution", [256, 448, 768, 1024])
def test_sizes_are_multiples_of_about_the_area(resolution: int) -> None:
    for bucket in ratio_buckets(resolution, 64):
        assert bucket.width % 64 == bucket.height % 64 == 0
        assert bucket.width * bucket.height == pytest.approx(resolution**2, rel=0.15)


def test_nearest_is_by_the_difference_of_ratios() -> None:
    wide, tall = Bucket(512, 384), Bucket(384, 512)
    assert nearest_ratio(1920, 1080, ratio_buckets(448)) == wide
    assert nearest_ratio(300, 900, ratio_buckets(448)) == tall


@pytest.mark.parametrize("resolution", [448, 512, 768, 1024])
def test_no_image_leaves_its_bucket_uncovered(resolution: int) -> None:
    buckets = ratio_buckets(resolution)
    sizes = [(b.width, b.height) for b in buckets] + [
        (w, h) for w in (97, 333, 1001) for h in (101, 640, 999)
    ]
    for width, height in sizes:
        bucket = nearest_ratio(width, height, buckets)
        (resized_width, resized_height), (left, top, right, bottom) = place(width, height, bucket)
        assert 0 <= left <= right <= resized_width
        assert 0 <= top <= bottom <= resized_height
        assert (right - left, bottom - top) == (bucket.width, bucket.height)
