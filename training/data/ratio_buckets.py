"""SingleStreamDiT's picture sizes: a short list of aspect ratios, each with about the area of a square.

They differ from `buckets.bucket_sizes` in the list and in the rounding; a model trained on one set meets
other position grids in the other. Source: Particle1904/SingleStreamDiT_T5Gemma2, preprocess.py at 01b01b7.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from training.data.buckets import Bucket

RATIOS = (1.0, 1.333, 0.75)
WIDE_RATIOS = (*RATIOS, 1.5, 0.666, 1.777, 0.562, 2.0, 0.5)
_WIDE_FROM = 512


class Placement(NamedTuple):
    """Size to which an image is resized, and the box (left, top, right, bottom) that is cut out of it."""

    size: tuple[int, int]
    box: tuple[int, int, int, int]


def ratio_buckets(resolution: int, multiple: int = 32) -> list[Bucket]:
    """Sizes of about `resolution` squared pixels in multiples of `multiple`, largest area first.

    Above 512 pixels there are nine ratios from 1:2 to 2:1, up to it three. Equal areas stand by width.
    """
    area = resolution**2
    ratios = RATIOS if resolution <= _WIDE_FROM else WIDE_RATIOS
    buckets = {
        Bucket(
            _to_multiple(math.sqrt(area * ratio), multiple), _to_multiple(math.sqrt(area / ratio), multiple)
        )
        for ratio in ratios
    }
    return sorted(buckets, key=lambda bucket: (-bucket.width * bucket.height, bucket.width))


def nearest_ratio(width: int, height: int, buckets: list[Bucket]) -> Bucket:
    """Bucket whose width / height differs least from the image's; the first of equals."""
    return min(buckets, key=lambda bucket: abs(bucket.width / bucket.height - width / height))


def place(width: int, height: int, bucket: Bucket) -> Placement:
    """How an image comes to cover a bucket: one side exact, the other rounded down, the centre cut out.

    The reference's rounding leaves some images a pixel short of the bucket; here no side is.
    """
    ratio = width / height
    if ratio > bucket.width / bucket.height:
        size = (max(bucket.width, int(bucket.height * ratio)), bucket.height)
    else:
        size = (bucket.width, max(bucket.height, int(bucket.width / ratio)))
    left, top = (size[0] - bucket.width) // 2, (size[1] - bucket.height) // 2
    return Placement(size, (left, top, left + bucket.width, top + bucket.height))


def _to_multiple(side: float, multiple: int) -> int:
    """Nearest multiple; of two equally near ones the even multiple."""
    return multiple * round(side / multiple)
