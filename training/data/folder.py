"""A folder of images and caption files as a list of samples."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from flowcore.errors import FlowCoreError
from training.config import Data, Dataset
from training.data.buckets import Bucket, fit

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"})


class DataError(FlowCoreError):
    """A sample or a dataset cannot be used."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One image file with its caption; `key` is the path relative to its dataset."""

    key: str
    path: Path
    caption: str
    width: int
    height: int


@dataclass(frozen=True, slots=True)
class Reject:
    """A file that was left out, and why."""

    path: Path
    reason: str


def scan(datasets: Iterable[Dataset], data: Data) -> tuple[list[Sample], list[Reject]]:
    """Samples of all datasets in the order of their names, and what was left out.

    Raises: DataError that names the folder or file and the remedy, for an empty or missing folder always, for a
        bad image or a missing caption unless the configuration says skip.
    """
    samples: list[Sample] = []
    rejects: list[Reject] = []
    for number, dataset in enumerate(datasets):
        found = _scan_folder(dataset, number, data, rejects)
        samples += found * dataset.repeats
    return samples, rejects


def _scan_folder(dataset: Dataset, number: int, data: Data, rejects: list[Reject]) -> list[Sample]:
    root = Path(dataset.path)
    where = f"datasets.{number}.path"
    if not root.is_dir():
        raise DataError(f"{where}: {root} must be a folder of images; no such folder")
    paths = sorted(p for p in root.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
    if not paths:
        raise DataError(f"{where}: {root} must hold images ({', '.join(sorted(IMAGE_SUFFIXES))}), found none")
    samples = []
    for path in paths:
        try:
            samples.append(_read_sample(path, root, dataset.caption_extension, data))
        except _SkippedError as err:
            rejects.append(Reject(path, str(err)))
    if not samples:
        raise DataError(f"{where}: no image of {root} can be used; the first was left out because {rejects[0].reason}")
    return samples


class _SkippedError(Exception):
    """A sample that the configuration says to leave out."""


def _read_sample(path: Path, root: Path, extension: str, data: Data) -> Sample:
    caption = _read_caption(path, extension, data)
    try:
        with Image.open(path) as image:
            width, height = image.size
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as err:
        message = f"{path}: image must decode ({err}); remove it or set data.on_error to skip"
        raise _refuse(message, data.on_error == "skip") from err
    return Sample(path.relative_to(root).as_posix(), path, caption, width, height)


def _read_caption(path: Path, extension: str, data: Data) -> str:
    caption = path.with_suffix(extension)
    try:
        return " ".join(caption.read_text(encoding="utf-8-sig").split())
    except FileNotFoundError as err:
        if data.missing_caption == "empty":
            return ""
        message = f"{path}: caption {caption.name} must exist; add it or set data.missing_caption to skip or empty"
        raise _refuse(message, data.missing_caption == "skip") from err
    except (OSError, UnicodeDecodeError) as err:
        message = f"{caption}: caption must be readable UTF-8 text ({err}); save it as UTF-8"
        raise _refuse(message, data.on_error == "skip") from err


def _refuse(message: str, skip: bool) -> Exception:
    return _SkippedError(message) if skip else DataError(message)


def load_image(sample: Sample, bucket: Bucket) -> Tensor:
    """Pixels `3 h w` in [-1, 1], fitted to the bucket; transparency over white.

    Raises: DataError if the file does not decode.
    """
    try:
        with Image.open(sample.path) as file:
            image = _flatten(file)
    except (OSError, ValueError, Image.DecompressionBombError) as err:
        raise DataError(f"{sample.path}: image must decode ({err}); remove it or set data.on_error to skip") from err
    pixels = torch.from_numpy(np.array(fit(image, bucket)))
    return pixels.permute(2, 0, 1).float().div_(127.5).sub_(1.0)


def _flatten(image: Image.Image) -> Image.Image:
    if "A" not in image.getbands() and "transparency" not in image.info:
        return image.convert("RGB")
    rgba = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
