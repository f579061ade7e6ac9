"""Pictures from files and to files, masks, and the settings that a PNG carries."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from flowcore.errors import ConfigError
from flowcore.images import (
    WriteError,
    add_settings,
    image_to_tensor,
    mask_to_tensor,
    read_image,
    read_settings,
    save_image,
    tensor_to_images,
)


def test_black_and_white_are_minus_one_and_one() -> None:
    for color, value in (((0, 0, 0), -1.0), ((255, 255, 255), 1.0)):
        tensor = image_to_tensor(Image.new("RGB", (4, 2), color), 4, 2)
        assert_close(tensor, torch.full((1, 3, 2, 4), value))


def test_every_gray_level_survives_the_round_trip() -> None:
    image = Image.frombytes("L", (256, 1), bytes(range(256))).convert("RGB")
    assert tensor_to_images(image_to_tensor(image, 256, 1))[0].tobytes() == image.tobytes()


def test_values_outside_the_range_are_clamped() -> None:
    low, high = tensor_to_images(torch.stack([torch.full((3, 1, 1), -9.0), torch.full((3, 1, 1), 9.0)]))
    assert (low.getpixel((0, 0)), high.getpixel((0, 0))) == ((0, 0, 0), (255, 255, 255))


def test_transparent_and_gray_pictures_become_rgb() -> None:
    for mode in ("RGBA", "L", "P", "LA"):
        assert image_to_tensor(Image.new(mode, (4, 4)), 8, 2).shape == (1, 3, 2, 8)


def test_mask_is_the_mean_over_each_cell() -> None:
    mask = Image.new("L", (16, 8), 0)
    mask.paste(255, (0, 0, 8, 8))
    mask.paste(255, (8, 0, 12, 8))
    assert_close(mask_to_tensor(mask, 2, 1), torch.tensor([[[[1.0, 0.5]]]]), atol=2 / 255, rtol=0)


def test_settings_survive_in_the_file(tmp_path: Path) -> None:
    image = Image.new("RGB", (4, 4), (1, 2, 3))
    add_settings(image, {"prompt": "a červený circle\n", "seed": 3, "mask": None})
    add_settings(image, {"command": "x"})
    path = save_image(image, tmp_path / "new" / "out.png")
    assert read_settings(path) == {"prompt": "a červený circle\n", "seed": 3, "command": "x"}
    assert read_image(path).tobytes() == image.tobytes()
    assert [entry.name for entry in path.parent.iterdir()] == ["out.png"]


def test_picture_without_settings_is_saved_and_named_when_read(tmp_path: Path) -> None:
    path = save_image(Image.new("RGB", (4, 4)), tmp_path / "plain.png")
    with pytest.raises(ConfigError, match=r"plain\.png must be a picture that FlowCore saved"):
        read_settings(path)


def test_upright_whatever_the_camera_said(tmp_path: Path) -> None:
    image = Image.new("RGB", (6, 2))
    exif = image.getexif()
    exif[0x0112] = 6  # turned by a quarter
    image.save(tmp_path / "photo.jpg", exif=exif)
    assert read_image(tmp_path / "photo.jpg").size == (2, 6)


@pytest.mark.parametrize("content", [b"", b"not a picture", b"\x89PNG\r\n\x1a\n\x00\x00"])
def test_files_that_do_not_decode_are_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(content)
    with pytest.raises(ConfigError, match=r"image .*bad\.png must decode, got .*; save it again"):
        read_image(tmp_path / "bad.png")


def test_truncated_picture_is_named(tmp_path: Path) -> None:
    image = Image.effect_noise((64, 64), 80)
    image.save(tmp_path / "whole.png")
    data = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "half.png").write_bytes(data[: len(data) // 2])
    with pytest.raises(ConfigError, match=r"half\.png must decode"):
        read_image(tmp_path / "half.png")


def test_only_png_is_written_and_failures_leave_nothing(tmp_path: Path) -> None:
    image = Image.new("RGB", (4, 4))
    with pytest.raises(ConfigError, match=r"must end in \.png, .*got 'a\.webp'"):
        save_image(image, "a.webp")
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(WriteError, match=r"out\.png must be writable, got .*; choose another path"):
        save_image(image, tmp_path / "file" / "out.png")
    (tmp_path / "taken.png").mkdir()
    with pytest.raises(WriteError, match=r"taken\.png must be writable"):
        save_image(image, tmp_path / "taken.png")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["file", "taken.png"]
