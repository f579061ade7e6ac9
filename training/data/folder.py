"""A folder of images and caption files as a list of samples."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from training.config import Data, Dataset
from training.data.images import image_size
from training.data.sample import DataError, Reject, Sample, SampleError
from training.stop import StopFlag

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"})


def scan(
    datasets: Iterable[Dataset], data: Data, stop: StopFlag | None = None
) -> tuple[list[Sample], list[Reject]]:
    """Samples of all datasets in the order of their names, and what was left out.

    Hidden files and folders (names that start with a dot) are not looked at.
    Raises: DataError that names the folder or file and the remedy, for an empty or missing folder always, for
        an image that cannot be used, a missing caption, or a caption without image unless the configuration
        says skip; StoppedError.
    """
    samples: list[Sample] = []
    rejects: list[Reject] = []
    flag = StopFlag() if stop is None else stop
    for number, dataset in enumerate(datasets):
        found = _scan_folder(dataset, f"datasets.{number}.path", data, rejects, flag)
        samples += found * dataset.repeats
    return samples, rejects


def _scan_folder(
    dataset: Dataset, where: str, data: Data, rejects: list[Reject], stop: StopFlag
) -> list[Sample]:
    root = Path(dataset.path).expanduser()
    if not root.is_dir():
        raise DataError(f"{where}: {root} must be a folder of images, got {_what_is(root)}")
    images, captions = _list_files(root, dataset.caption_extension)
    if not images:
        raise DataError(f"{where}: {root} must hold images ({', '.join(sorted(IMAGE_SUFFIXES))}), found none")
    samples: list[Sample] = []
    refused: list[Reject] = []
    named = {path.with_suffix(dataset.caption_extension) for path in images}
    for path in [*images, *(caption for caption in captions if caption not in named)]:
        stop.check()
        try:
            samples.append(_read_sample(path, root, dataset.caption_extension, data))
        except SampleError as err:
            if not _is_skipped(err, data):
                raise
            refused.append(Reject(err.path, err.reason))
    rejects += refused
    if not samples:
        first = refused[0]
        raise DataError(f"{where}: {root} must hold a usable image, got none; {first.path}: {first.reason}")
    return samples


def _list_files(root: Path, caption_extension: str) -> tuple[list[Path], list[Path]]:
    """Images and caption files below a folder, in the order of their names."""
    images, captions = [], []
    for path in sorted(root.rglob("*"), key=lambda p: p.relative_to(root).parts):
        if any(part.startswith(".") for part in path.relative_to(root).parts):
            continue
        if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file():
            images.append(path)
        elif path.suffix == caption_extension and path.is_file():
            captions.append(path)
    return images, captions


def _is_skipped(err: SampleError, data: Data) -> bool:
    return {"on_error": data.on_error, "missing_caption": data.missing_caption}[err.setting] == "skip"


def _what_is(path: Path) -> str:
    return "a file" if path.exists() else "nothing there"


def _read_sample(path: Path, root: Path, extension: str, data: Data) -> Sample:
    """The sample of an image. Raises: SampleError; also for a path that is a caption, which has no image."""
    if path.suffix.lower() not in IMAGE_SUFFIXES:
        raise SampleError(path, "caption must have an image of the same name beside it, found none")
    caption = _read_caption(path, extension, data)
    width, height = image_size(path)
    return Sample(path.relative_to(root).as_posix(), path, caption, width, height)


def _read_caption(path: Path, extension: str, data: Data) -> str:
    caption = path.with_suffix(extension)
    try:
        return " ".join(caption.read_text(encoding="utf-8-sig").split())
    except FileNotFoundError as err:
        if data.missing_caption == "empty":
            return ""
        raise SampleError(
            path,
            f"caption {caption.name} must exist",
            setting="missing_caption",
            remedy="add it or set data.missing_caption to skip or empty",
        ) from err
    except (OSError, UnicodeDecodeError) as err:
        raise SampleError(
            caption,
            f"caption must be readable UTF-8 text, got {err}",
            remedy="save it as UTF-8 or set data.on_error to skip",
        ) from err
