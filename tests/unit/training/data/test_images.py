"""Image files as pixels."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.unit.training.workspace import write_images
from training.data.buckets import Bucket
from training.data.images import image_size, load_image
from training.data.sample import SampleError

ORIENTATION = 0x0112


def load(path: Path, width: int = 32, height: int = 32) -> Tensor:
    return load_image(path, Bucket(width, height))


def to_bytes(pixels: Tensor) -> np.ndarray:
    return pixels.add(1).mul(127.5).round().byte().permute(1, 2, 0).numpy()


def test_pixels_are_those_of_the_file(tmp_path: Path) -> None:
    path = write_images(tmp_path, 1) / "00.png"
    pixels = load(path)
    assert pixels.shape == (3, 32, 32)
    assert pixels.dtype == torch.float32
    assert pixels.abs().max() <= 1
    assert np.array_equal(to_bytes(pixels), np.asarray(Image.open(path)))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_becomes_white(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "a.png"
    if mode == "P":
        Image.new("P", (32, 32), 0).save(path, transparency=0)
    else:
        Image.new(mode, (32, 32), 0).save(path)
    assert load(path).min() == 1


def test_half_transparent_pixels_are_mixed_with_white(tmp_path: Path) -> None:
    Image.new("RGBA", (32, 32), (0, 0, 0, 128)).save(tmp_path / "a.png")
    assert abs(int(to_bytes(load(tmp_path / "a.png"))[0, 0, 0]) - 127) <= 1


@pytest.mark.parametrize(("mode", "value"), [("L", 200), ("1", 1), ("CMYK", (0, 0, 0, 0)), ("I;16", 51400)])
def test_other_modes_become_rgb(tmp_path: Path, mode: str, value: int) -> None:
    path = tmp_path / "a.tiff"
    Image.new(mode, (32, 32), value).save(path)
    expected = {"L": 200, "1": 255, "CMYK": 255, "I;16": 200}[mode]
    assert (to_bytes(load(path)) == expected).all()


def test_a_photograph_is_turned_as_its_exif_data_says(tmp_path: Path) -> None:
    pixels = np.zeros((32, 48, 3), np.uint8)
    pixels[:, :24] = 255
    exif = Image.Exif()
    exif[ORIENTATION] = 6  # held upright: the file's left is the picture's top
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    assert image_size(tmp_path / "a.png") == (32, 48)
    turned = load(tmp_path / "a.png", 32, 48)
    assert turned[:, :24].min() == 1
    assert turned[:, 24:].max() == -1


def test_broken_exif_data_is_ignored(tmp_path: Path) -> None:
    Image.new("RGB", (32, 32)).save(tmp_path / "a.jpg", exif=b"Exif\0\0nonsense")
    assert image_size(tmp_path / "a.jpg") == (32, 32)
    assert load(tmp_path / "a.jpg").shape == (3, 32, 32)


@pytest.mark.parametrize("ending", ["png", "jpg", "webp", "bmp", "tif"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_a_truncated_file_is_named(tmp_path: Path, ending: str, share: float) -> None:
    path = tmp_path / f"a.{ending}"
    Image.effect_noise((32, 32), 90).convert("RGB").save(path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(
        SampleError, match=r"a\.\w+: image must decode, got .*; remove it or set data\.on_error"
    ):
        load(path)


def test_a_broken_chunk_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.effect_noise((32, 32), 90).convert("RGB").save(path)
    content = bytearray(path.read_bytes())
    place = content.index(b"IDAT")
    content[place : place + 4] = b"\0\0\0\0"
    path.write_bytes(content)
    with pytest.raises(SampleError, match=r"image must decode"):
        load(path)


def test_a_large_image_gives_no_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_images(tmp_path, 1) / "00.png"
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    assert image_size(path) == (32, 32)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    with pytest.raises(SampleError, match=r"exceeds limit"):
        image_size(path)
