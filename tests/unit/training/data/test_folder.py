"""Folders of images and captions: what is found, and what is said of everything that cannot be used."""

import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from tests.unit.training.workspace import write_images
from training.config import Data, Dataset
from training.data.folder import scan
from training.data.sample import DataError, Reject, Sample
from training.stop import StopFlag, StoppedError

STOP, SKIP = Data(), Data(on_error="skip", missing_caption="skip")


def scan_one(folder: Path, data: Data = STOP, **settings: object) -> tuple[list[Sample], list[Reject]]:
    return scan([Dataset.model_validate({"path": str(folder), **settings})], data)


def test_images_at_any_depth_are_found_in_the_order_of_their_names(tmp_path: Path) -> None:
    write_images(tmp_path / "b", 2)
    write_images(tmp_path, 1)
    (tmp_path / "00.txt").write_text("\ufeff  two\n words  ", encoding="utf-8")
    samples, rejects = scan_one(tmp_path)
    assert [sample.key for sample in samples] == ["00.png", "b/00.png", "b/01.png"]
    assert samples[0] == Sample("00.png", tmp_path / "00.png", "two words", 32, 32)
    assert rejects == []


def test_endings_may_be_in_capitals_and_hidden_files_are_left_alone(tmp_path: Path) -> None:
    write_images(tmp_path, 1)
    (tmp_path / "00.png").rename(tmp_path / "00.PNG")
    (tmp_path / "._00.png").write_bytes(b"resource fork")
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "x.txt").write_text("no caption", encoding="utf-8")
    (tmp_path / "folder.png").mkdir()
    assert [sample.key for sample in scan_one(tmp_path)[0]] == ["00.PNG"]


def test_a_source_picture_belongs_to_the_image_of_its_name(tmp_path: Path) -> None:
    write_images(tmp_path, 3)
    (tmp_path / "01.png").rename(tmp_path / "01.source.png")
    (tmp_path / "02.png").rename(tmp_path / "01.webp")
    (tmp_path / "02.txt").unlink()
    for number in (0, 1):
        facts = '{"target": "a red circle at the top", "answer": "a red circle"}'
        (tmp_path / f"0{number}.json").write_text(facts, encoding="utf-8")
    samples, _ = scan_one(tmp_path)
    assert [(sample.key, sample.caption, sample.source, sample.answer) for sample in samples] == [
        ("00.png", "picture 0", None, None),
        ("01.webp", "picture 1", tmp_path / "01.source.png", "a red circle"),
    ]


def test_repeats_and_caption_extension(tmp_path: Path) -> None:
    write_images(tmp_path, 2)
    for number in range(2):
        (tmp_path / f"0{number}.caption").write_text(f"other {number}", encoding="utf-8")
    samples, _ = scan_one(tmp_path, repeats=3, caption_extension=".caption")
    assert [sample.caption for sample in samples] == ["other 0", "other 1"] * 3


def test_several_folders_are_joined(tmp_path: Path) -> None:
    folders = [write_images(tmp_path / name, 2) for name in ("a", "b")]
    samples, _ = scan([Dataset(path=str(folder)) for folder in folders], STOP)
    assert len(samples) == 4


def test_a_stop_is_heeded(tmp_path: Path) -> None:
    stop = StopFlag()
    stop.requested = True
    with pytest.raises(StoppedError):
        scan([Dataset(path=str(write_images(tmp_path)))], STOP, stop)


def png(width: int, height: int) -> bytes:
    """A PNG that claims a size, without its pixels."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [b"IHDR" + head, b"IDAT" + zlib.compress(b""), b"IEND"]
    framed = [struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(framed)


def make_caption_missing(folder: Path) -> Path:
    (folder / "00.txt").unlink()
    return folder / "00.png"


def make_caption_latin(folder: Path) -> Path:
    (folder / "00.txt").write_bytes("Äpfel".encode("latin-1"))
    return folder / "00.txt"


def make_image_missing(folder: Path) -> Path:
    (folder / "00.png").unlink()
    return folder / "00.txt"


def make_facts_broken(folder: Path) -> Path:
    return make_facts(folder, '{"target": "a"')


def make_facts_a_list(folder: Path) -> Path:
    return make_facts(folder, "[]")


def make_target_a_number(folder: Path) -> Path:
    return make_facts(folder, '{"target": 1}')


def make_answer_a_number(folder: Path) -> Path:
    return make_facts(folder, '{"target": "a red circle", "answer": 1}')


def make_facts(folder: Path, text: str) -> Path:
    """Beside an edit."""
    shutil.copy(folder / "01.png", folder / "00.source.png")
    (folder / "00.json").write_text(text, encoding="utf-8")
    return folder / "00.json"


def make_source_alone(folder: Path) -> Path:
    (folder / "00.txt").unlink()
    return (folder / "00.png").rename(folder / "00.source.png")


def make_source_empty(folder: Path) -> Path:
    (folder / "00.source.png").write_bytes(b"")
    return folder / "00.source.png"


def make_empty(folder: Path) -> Path:
    (folder / "00.png").write_bytes(b"")
    return folder / "00.png"


def make_text(folder: Path) -> Path:
    (folder / "00.png").write_text("<html>", encoding="utf-8")
    return folder / "00.png"


def make_cut_header(folder: Path) -> Path:
    (folder / "00.png").write_bytes((folder / "00.png").read_bytes()[:20])
    return folder / "00.png"


def make_dot(folder: Path) -> Path:
    Image.new("RGB", (1, 1)).save(folder / "00.png")
    return folder / "00.png"


def make_huge(folder: Path) -> Path:
    (folder / "00.png").write_bytes(png(60000, 60000))
    return folder / "00.png"


FAULTS = [
    (make_caption_missing, "caption 00.txt must exist; add it or set data.missing_caption to skip or empty"),
    (make_caption_latin, "caption must be readable UTF-8 text"),
    (make_image_missing, "caption must have an image of the same name beside it"),
    (make_source_alone, "source picture must have an image of the same name beside it"),
    (make_source_empty, "image must decode, got cannot identify image file"),
    (make_facts_broken, "must be readable JSON, an object, got "),
    (make_facts_a_list, "must be readable JSON, an object, got "),
    (make_target_a_number, "target must be a text, got 1"),
    (make_answer_a_number, "answer must be a text, got 1"),
    (make_empty, "image must decode, got cannot identify image file"),
    (make_text, "image must decode"),
    (make_cut_header, "image must decode"),
    (make_dot, "image must have sides of at least 8 pixels, got 1x1"),
    (make_huge, "image must decode, got Image size (3600000000 pixels) exceeds limit"),
]


@pytest.mark.parametrize(("spoil", "message"), FAULTS)
def test_a_file_that_cannot_be_used_is_named_with_a_remedy(
    tmp_path: Path, spoil: Callable[[Path], Path], message: str
) -> None:
    named = spoil(write_images(tmp_path, 3))
    with pytest.raises(DataError) as caught:
        scan_one(tmp_path)
    assert str(caught.value).startswith(f"{named}: {message}")
    assert "skip" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("spoil", "message"), FAULTS)
def test_it_is_left_out_and_listed_if_the_configuration_says_so(
    tmp_path: Path, spoil: Callable[[Path], Path], message: str
) -> None:
    named = spoil(write_images(tmp_path, 3))
    samples, rejects = scan_one(tmp_path, SKIP)
    assert [sample.key for sample in samples] == ["01.png", "02.png"]
    assert [reject.path for reject in rejects] == [named]
    assert rejects[0].reason.startswith(message.partition(";")[0])
    assert "data." not in rejects[0].reason


def test_the_two_settings_are_told_apart(tmp_path: Path) -> None:
    make_caption_missing(write_images(tmp_path, 3))
    with pytest.raises(DataError, match=r"missing_caption"):
        scan_one(tmp_path, Data(on_error="skip"))
    make_dot(write_images(tmp_path, 3))
    with pytest.raises(DataError, match=r"data\.on_error"):
        scan_one(tmp_path, Data(missing_caption="skip"))


def test_a_missing_caption_can_stand_for_the_empty_one(tmp_path: Path) -> None:
    make_caption_missing(write_images(tmp_path, 2))
    samples, rejects = scan_one(tmp_path, Data(missing_caption="empty"))
    assert [sample.caption for sample in samples] == ["", "picture 1"]
    assert rejects == []


def test_a_folder_without_images_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"datasets\.0\.path: .* must hold images \(\.bmp, .*found none"):
        scan_one(tmp_path)


def test_a_missing_folder_and_a_file_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"datasets\.0\.path: .*gone must be a folder of images, got nothing"):
        scan_one(tmp_path / "gone")
    (tmp_path / "file").write_text("x", encoding="utf-8")
    with pytest.raises(DataError, match=r"must be a folder of images, got a file"):
        scan_one(tmp_path / "file")


def test_a_folder_whose_images_are_all_left_out_is_an_error(tmp_path: Path) -> None:
    make_dot(write_images(tmp_path, 1))
    with pytest.raises(DataError, match=r"must hold a usable image, got none; .*00\.png: image must have"):
        scan_one(tmp_path, SKIP)
