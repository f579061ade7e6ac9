"""Aspect buckets: the picture sizes of a run, and how an image is brought to one of them."""

from __future__ import annotations

import math
from dataclasses import dataclass

from PIL import Image


@dataclass(frozen=True, slots=True, order=True)
class Bucket:
    """Picture size in pixels."""

    width: int
    height: int


def bucket_sizes(resolution: int, multiple: int, max_aspect: float) -> list[Bucket]:
    """Sizes that are multiples of `multiple`, of at most `resolution` squared pixels and `max_aspect` long.

    For each width the tallest height that fits is taken, so areas stay close to the square's.
    """
    longest = int(resolution * math.sqrt(max_aspect)) // multiple * multiple
    buckets = {Bucket(resolution, resolution)}
    for long_side in range(resolution, longest + 1, multiple):
        short_side = resolution * resolution // long_side // multiple * multiple
        if short_side and long_side / short_side <= max_aspect:
            buckets |= {Bucket(long_side, short_side), Bucket(short_side, long_side)}
    return sorted(buckets)


def nearest_bucket(width: int, height: int, buckets: list[Bucket]) -> Bucket:
    """Bucket whose aspect ratio is nearest to the image's in logarithm (the larger one of equals)."""
    aspect = math.log(width / height)
    return min(buckets, key=lambda b: (abs(math.log(b.width / b.height) - aspect), -b.width * b.height))


def crop_and_zoom(width: int, height: int, bucket: Bucket) -> tuple[float, float]:
    """Share of the image's area that `fit` cuts off, and the factor by which it scales the sides."""
    scale = max(bucket.width / width, bucket.height / height)
    return 1 - bucket.width * bucket.height / (width * height * scale * scale), scale


def fit(image: Image.Image, bucket: Bucket) -> Image.Image:
    """Image resized to cover the bucket (bicubic) and cropped at the centre to exactly its size."""
    if image.size == (bucket.width, bucket.height):
        return image
    scale = max(bucket.width / image.width, bucket.height / image.height)
    size = (max(bucket.width, round(image.width * scale)), max(bucket.height, round(image.height * scale)))
    resized = image.resize(size, Image.Resampling.BICUBIC)
    left, top = (size[0] - bucket.width) // 2, (size[1] - bucket.height) // 2
    return resized.crop((left, top, left + bucket.width, top + bucket.height))
