"""Encoded samples: equal with and without a cache, edits noticed, bad files named or left out."""

import os
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from PIL import Image
from torch import Tensor

from flowcore.conditioning import Conditioning
from tests.unit.training.workspace import write_images
from training.config import Data, Dataset
from training.data.buckets import Bucket
from training.data.encoded import EncodedSamples
from training.data.folder import scan
from training.data.sample import DataError, Sample
from training.encoders import ByteEncoder, PixelEncoder
from training.stop import StopFlag

BUCKET = Bucket(32, 32)


class CountingPixels:
    """The pixel encoder, counting its pictures; `poison` makes those of that mean value infinite."""

    channels, identity = 4, "pixels-8"
    facts: ClassVar[dict[str, str]] = {}

    def __init__(self, is_poisoned: bool = False) -> None:
        self.count, self.is_poisoned, self.inner = 0, is_poisoned, PixelEncoder(4)

    def encode(self, images: Tensor) -> Tensor:
        self.count += len(images)
        return self.inner.encode(images) + (torch.inf if self.is_poisoned and self.count == 2 else 0)

    def decode(self, latents: Tensor) -> Tensor:
        return self.inner.decode(latents)


class PaddedCaptions:
    """States that depend on the longest caption of the batch, as rounding makes those of a real encoder."""

    identity, width = "padded", 4

    def __init__(self) -> None:
        self.count = 0

    def encode(self, prompts: list[str]) -> Conditioning:
        self.count += len(prompts)
        inner = ByteEncoder(4, 40).encode(prompts)
        assert inner.context is not None
        longest = max(map(len, prompts))
        return Conditioning(context=inner.context + longest * 1e-3, context_mask=inner.context_mask)


def encode(folder: Path, cache: Path | None, *, dtype: str = "float32", **options: object) -> EncodedSamples:
    samples, _ = scan([Dataset(path=str(folder))], Data())
    return EncodedSamples(
        samples,
        [BUCKET] * len(samples),
        options.get("images") or PixelEncoder(4),  # type: ignore[arg-type]
        options.get("captions") or ByteEncoder(4, 16),  # type: ignore[arg-type]
        folder=cache,
        dtype=dtype,
        stop=StopFlag(),
        is_lenient=bool(options.get("is_lenient")),
    )


def assert_equal(actual: EncodedSamples, expected: EncodedSamples) -> None:
    numbers = range(len(expected.samples))
    assert [s.key for s in actual.samples] == [s.key for s in expected.samples]
    assert torch.equal(actual.latents(numbers), expected.latents(numbers))
    rows = [0, *numbers], [True] + [False] * len(numbers)
    found, wanted = actual.conditioning(*rows), expected.conditioning(*rows)
    assert found.context is not None
    assert wanted.context is not None
    assert torch.equal(found.context, wanted.context)
    assert found.context_mask is not None
    assert wanted.context_mask is not None
    assert torch.equal(found.context_mask, wanted.context_mask)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_cached_samples_equal_uncached_ones(tmp_path: Path, dtype: str) -> None:
    folder = write_images(tmp_path / "images")
    plain = encode(folder, None, dtype=dtype)
    assert_equal(encode(folder, tmp_path / "cache", dtype=dtype), plain)
    images, captions = CountingPixels(), ByteEncoder(4, 16)
    assert_equal(encode(folder, tmp_path / "cache", dtype=dtype, images=images, captions=captions), plain)
    assert images.count == 0


def test_an_edited_image_is_encoded_again(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "images")
    encode(folder, tmp_path / "cache")
    (folder / "03.png").write_bytes((folder / "05.png").read_bytes() + b"\0")
    images = CountingPixels()
    assert_equal(encode(folder, tmp_path / "cache", images=images), encode(folder, None))
    assert images.count == 1


def test_source_pictures_are_encoded_and_their_edits_noticed(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "images", 4)
    for number in (1, 3):
        (folder / f"0{number - 1}.png").rename(folder / f"0{number}.source.png")
        (folder / f"0{number - 1}.txt").unlink()
    made = encode(folder, tmp_path / "cache")
    assert [sample.key for sample in made.samples] == ["01.png", "03.png"]
    assert torch.equal(made.source_latents([1, 0]), encode(folder, None).source_latents([1, 0]))
    plain = encode(write_images(tmp_path / "plain", 4), None)
    assert torch.equal(made.source_latents([0, 1]), plain.latents([0, 2]))
    assert torch.equal(made.latents([0, 1]), plain.latents([1, 3]))
    (folder / "03.source.png").write_bytes((folder / "01.source.png").read_bytes())
    images = CountingPixels()
    edited = encode(folder, tmp_path / "cache", images=images)
    assert torch.equal(edited.source_latents([0, 1]), plain.latents([0, 0]))
    assert images.count == 0
    truncate(folder / "01.source.png")
    left = encode(folder, tmp_path / "cache", is_lenient=True)
    assert [sample.key for sample in left.samples] == ["03.png"]
    assert [reject.path.name for reject in left.rejects] == ["01.source.png"]


def test_an_image_of_equal_size_and_time_is_noticed(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "images", 2)
    contents = []
    for number in range(2):
        Image.open(folder / f"0{number}.png").save(tmp_path / f"{number}.bmp")
        contents.append((tmp_path / f"{number}.bmp").read_bytes())
        (folder / f"0{number}.png").unlink()
    (folder / "01.txt").unlink()
    path = folder / "00.bmp"
    path.write_bytes(contents[0])
    encode(folder, tmp_path / "cache")
    before = path.stat()
    path.write_bytes(contents[1])
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size
    assert_equal(encode(folder, tmp_path / "cache"), encode(folder, None))


@pytest.mark.parametrize("number", [0, 3])
def test_edited_and_added_captions_leave_no_trace_of_the_old_padding(tmp_path: Path, number: int) -> None:
    folder = write_images(tmp_path / "images")
    encode(folder, tmp_path / "cache", captions=PaddedCaptions())
    (folder / f"{number:02d}.txt").write_text("a caption that is longer than all others", encoding="utf-8")
    cached = encode(folder, tmp_path / "cache", captions=PaddedCaptions())
    assert_equal(cached, encode(folder, None, captions=PaddedCaptions()))


def test_an_unchanged_set_of_captions_is_not_encoded_again(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "images")
    encode(folder, tmp_path / "cache", captions=PaddedCaptions())
    captions = PaddedCaptions()
    encode(folder, tmp_path / "cache", captions=captions)
    assert captions.count == 0


def test_images_that_moved_are_found_by_their_content(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "images")
    encode(folder, tmp_path / "cache")
    folder.rename(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "07.png").rename(tmp_path / "elsewhere" / "x.png")
    (tmp_path / "elsewhere" / "07.txt").rename(tmp_path / "elsewhere" / "x.txt")
    images = CountingPixels()
    encode(tmp_path / "elsewhere", tmp_path / "cache", images=images)
    assert images.count == 0


def test_another_bucket_is_encoded_anew(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "images", 2)
    encode(folder, tmp_path / "cache")
    samples, _ = scan([Dataset(path=str(folder))], Data())
    wide = EncodedSamples(
        samples,
        [Bucket(48, 32)] * 2,
        PixelEncoder(4),
        ByteEncoder(4, 16),
        folder=tmp_path / "cache",
        dtype="float32",
        stop=StopFlag(),
    )
    assert wide.latents([0, 1]).shape == (2, 4, 4, 6)


def test_equal_images_and_captions_are_encoded_once(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "images", 1)
    samples, _ = scan([Dataset(path=str(folder), repeats=5)], Data())
    images = CountingPixels()
    made = EncodedSamples(
        samples, [BUCKET] * 5, images, ByteEncoder(4, 16), folder=None, dtype="float32", stop=StopFlag()
    )
    assert images.count == 1
    assert made.latents(range(5)).shape == (5, 4, 4, 4)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-300])


def test_an_image_that_fails_when_it_is_loaded_stops_the_run(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "images")
    truncate(folder / "02.png")
    with pytest.raises(
        DataError, match=r"02\.png: image must decode, got .*; remove it or set data\.on_error"
    ):
        encode(folder, tmp_path / "cache")


@pytest.mark.parametrize("is_cached", [True, False])
def test_it_is_left_out_and_listed_if_the_configuration_says_so(tmp_path: Path, is_cached: bool) -> None:
    folder = write_images(tmp_path / "images")
    truncate(folder / "02.png")
    truncate(folder / "07.png")
    for _ in range(2):
        made = encode(folder, tmp_path / "cache" if is_cached else None, is_lenient=True)
        assert [sample.key for sample in made.samples] == [f"{n:02d}.png" for n in (0, 1, 3, 4, 5, 6)]
        assert [reject.path.name for reject in made.rejects] == ["02.png", "07.png"]
        assert made.rejects[0].reason.startswith("image must decode")
        assert len(made.buckets) == 6
        assert made.latents(range(6)).shape[0] == 6


def test_all_images_left_out_is_an_error(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "images", 1)
    truncate(folder / "00.png")
    with pytest.raises(
        DataError, match=r"datasets must hold a usable image, got none; .*00\.png: image must"
    ):
        encode(folder, None, is_lenient=True)


def test_a_file_that_vanishes_after_the_scan_is_named(tmp_path: Path) -> None:
    sample = Sample("a.png", tmp_path / "a.png", "", 32, 32)
    options = {"folder": None, "dtype": "float32", "stop": StopFlag()}
    with pytest.raises(DataError, match=r"a\.png: image must be readable"):
        EncodedSamples([sample], [BUCKET], PixelEncoder(4), ByteEncoder(4, 16), **options)  # type: ignore[arg-type]


def test_latents_that_are_not_finite_are_named_or_left_out(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "images", 3)
    with pytest.raises(DataError, match=r"01\.png: latents of the image must be finite"):
        encode(folder, None, images=CountingPixels(is_poisoned=True))
    made = encode(folder, None, images=CountingPixels(is_poisoned=True), is_lenient=True)
    assert [sample.key for sample in made.samples] == ["00.png", "02.png"]


def test_conditioning_is_padded_with_a_mask(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "images", 2)
    (folder / "00.txt").write_text("ab", encoding="utf-8")
    conditioning = encode(folder, None).conditioning([0, 1, 0], [False, False, True])
    assert conditioning.context is not None
    assert conditioning.context_mask is not None
    assert conditioning.context.shape == (3, 9, 4)
    assert conditioning.context_mask.sum(1).tolist() == [2, 9, 1]
