"""Folders of images and caption files, of trajectories, or of encoded samples, as a list of samples."""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import partial
from pathlib import Path

from training.config import Data, Dataset
from training.data.images import image_size
from training.data.latents import scan_latents
from training.data.sample import SOURCE_ENDING, DataError, Reject, Sample, SampleError, read_usable
from training.data.trajectories import scan_trajectories
from training.stop import StopFlag

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"})


def scan(
    datasets: Iterable[Dataset], data: Data, stop: StopFlag | None = None
) -> tuple[list[Sample], list[Reject]]:
    """Samples of all datasets in the order of their names (or numbers), and what was left out.

    `NAME.source.png` is no sample, but the source picture of `NAME.png` (or of another image of that name).
    Hidden files and folders (names that start with a dot) are not looked at.
    Raises: DataError that names the folder or file and the remedy, for an empty or missing folder always, for
        an image that cannot be used, a missing caption, or a caption or source without image unless the
        configuration says skip; StoppedError.
    """
    samples: list[Sample] = []
    rejects: list[Reject] = []
    flag = StopFlag() if stop is None else stop
    for number, dataset in enumerate(datasets):
        where = f"datasets.{number}.path"
        if dataset.kind == "trajectories":
            found = scan_trajectories(Path(dataset.path).expanduser(), where, flag, edits=dataset.edits)
        elif dataset.kind == "latents":
            found = scan_latents(dataset, where, data, rejects, flag)
        else:
            found = _scan_folder(dataset, where, data, rejects, flag)
        samples += found * dataset.repeats
    return samples, rejects


def _scan_folder(
    dataset: Dataset, where: str, data: Data, rejects: list[Reject], stop: StopFlag
) -> list[Sample]:
    root = Path(dataset.path).expanduser()
    if not root.is_dir():
        raise DataError(f"{where}: {root} must be a folder of images, got {_what_is(root)}")
    images, rest = list_files(root, dataset.caption_extension)
    if not images:
        raise DataError(f"{where}: {root} must hold images ({', '.join(sorted(IMAGE_SUFFIXES))}), found none")
    named = {path.with_suffix(end) for path in images for end in (dataset.caption_extension, SOURCE_ENDING)}
    paths = [*images, *(path for path in rest if path not in named)]
    read = partial(_read_sample, root=root, extension=dataset.caption_extension, data=data)
    return read_usable(paths, read, data, rejects, stop, f"{where}: {root} must hold a usable image")


def list_files(root: Path, caption_extension: str) -> tuple[list[Path], list[Path]]:
    """Images below a folder, and captions and source pictures, in the order of their names."""
    images, rest = [], []
    for path in sorted(root.rglob("*"), key=lambda p: p.relative_to(root).parts):
        if any(part.startswith(".") for part in path.relative_to(root).parts):
            continue
        if path.name.endswith((SOURCE_ENDING, caption_extension)) and path.is_file():
            rest.append(path)
        elif path.suffix.lower() in IMAGE_SUFFIXES and path.is_file():
            images.append(path)
    return images, rest


def _what_is(path: Path) -> str:
    return "a file" if path.exists() else "nothing there"


def _read_sample(path: Path, root: Path, extension: str, data: Data) -> Sample:
    """The sample of an image. Raises: SampleError; also for a caption or a source picture without image."""
    if path.name.endswith((SOURCE_ENDING, extension)):
        what = "caption" if path.name.endswith(extension) else "source picture"
        raise SampleError(path, f"{what} must have an image of the same name beside it, found none")
    caption = _read_caption(path, extension, data)
    width, height = image_size(path)
    source = path.with_suffix(SOURCE_ENDING)
    if not source.is_file():
        return Sample(path.relative_to(root).as_posix(), path, caption, width, height)
    image_size(source)
    return Sample(path.relative_to(root).as_posix(), path, caption, width, height, source, _read_answer(path))


def _read_answer(path: Path) -> str | None:
    """What a model is to say: of `NAME.json` the `answer`, else the `target`; None without both."""
    facts = path.with_suffix(".json")
    try:
        stated = json.loads(facts.read_text(encoding="utf-8"))
        name = "answer" if stated.get("answer") is not None else "target"
        answer = stated.get(name)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, AttributeError) as err:
        raise SampleError(facts, f"must be readable JSON, an object, got {err}") from err
    if answer is not None and not isinstance(answer, str):
        raise SampleError(facts, f"{name} must be a text, got {answer!r}")
    return answer


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
