"""Image files as pixels: upright, opaque, fitted to a bucket."""

from __future__ import annotations

import contextlib
import struct
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from training.data.buckets import Bucket, fit
from training.data.sample import SampleError

MIN_SIDE = 8
# What Pillow's readers raise for bytes that are no image, by format; SyntaxError is theirs for a broken PNG.
_UNDECODABLE = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    LookupError,
    TypeError,
    OverflowError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def image_size(path: Path) -> tuple[int, int]:
    """Width and height of an image as it is seen, from its header alone.

    Raises: SampleError if the header cannot be read, or the image is too small or too large to use.
    """
    try:
        with _opened(path) as image:
            width, height = image.size
            turned = _orientation(image) >= 5
    except _UNDECODABLE as err:
        raise _undecodable(path, err) from err
    if min(width, height) < MIN_SIDE:
        raise SampleError(path, f"image must have sides of at least {MIN_SIDE} pixels, got {width}x{height}")
    return (height, width) if turned else (width, height)


def load_image(path: Path, bucket: Bucket) -> Tensor:
    """Pixels `3 h w` in [-1, 1], fitted to the bucket; turned as EXIF data says, transparency over white.

    Raises: SampleError if the file does not decode.
    """
    try:
        with _opened(path) as file:
            turn = _UPRIGHT.get(_orientation(file))
            image = _flatten(file)
            pixels = np.array(fit(image.transpose(turn) if turn is not None else image, bucket))
    except _UNDECODABLE as err:
        raise _undecodable(path, err) from err
    return torch.from_numpy(pixels).permute(2, 0, 1).float().div_(127.5).sub_(1.0)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """The image file, without a warning for large ones; those too large to be true still raise."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        with Image.open(path) as image:
            yield image


def _undecodable(path: Path, err: Exception) -> SampleError:
    reason = " ".join(str(err).replace(repr(str(path)), "it").split()) or type(err).__name__
    return SampleError(path, f"image must decode, got {reason}")


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 = upright; 1 where there is none or it is broken."""
    if "exif" not in image.info:
        return 1
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except _UNDECODABLE:
        return 1


def _flatten(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if "A" not in image.getbands() and "transparency" not in image.info:
        return image.convert("RGB")
    rgba = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
