"""Writes captioned scenes, and edits of scenes, as a folder of pictures with same-named text files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from training.data.sample import SOURCE_ENDING

from .captions import caption_scene
from .draw import MIN_SIZE, draw
from .edits import Edit, iterate_edits
from .errors import SceneError
from .scene import ObjectCount, Scene, Split, random_scene

_MAX_SIZE = 4096


def iterate_scenes(
    count: int, seed: int, *, objects: ObjectCount = "one", split: Split = "train"
) -> Iterator[tuple[Scene, str]]:
    """Scenes with captions; number i depends on seed and i alone, not on count.

    Captions of the test split name every attribute, so that none of them occurs in training.
    """
    for index in range(count):
        rng = np.random.default_rng([seed, index])
        scene = random_scene(rng, objects, split=split)
        yield scene, caption_scene(scene, rng, is_complete=split == "test")


def write_folder(
    folder: Path,
    count: int,
    seed: int,
    *,
    size: int = 128,
    objects: ObjectCount = "one",
    split: Split = "train",
    is_forced: bool = False,
    is_quiet: bool = False,
) -> None:
    """Write `scene-000000.png` and `scene-000000.txt` and so on into folder, with a progress bar on stderr.

    Raises:
        SceneError: If a number is out of range, or the folder holds files and is_forced is not set.
        OSError: If a file cannot be written.
    """
    _prepare(folder, count, seed, size, is_forced=is_forced)
    scenes: Iterable[tuple[Scene, str]] = iterate_scenes(count, seed, objects=objects, split=split)
    for index, (scene, caption) in enumerate(
        tqdm(scenes, total=count, desc="scenes", unit="image", disable=is_quiet)
    ):
        _write(folder / f"scene-{index:06d}.png", draw(scene, size), caption)


def write_edits(
    folder: Path,
    count: int,
    seed: int,
    *,
    size: int = 128,
    objects: ObjectCount = "mixed",
    split: Split = "train",
    is_forced: bool = False,
    is_quiet: bool = False,
) -> None:
    """Write edits into folder, with a progress bar on stderr.

    `edit-000000.png` is the target, `.source.png` the source, `.txt` what is asked for, and `.json` holds the
    kind of the edit, its instruction, the target's plain caption and what a model is to answer.

    Raises:
        SceneError: If a number is out of range, or the folder holds files and is_forced is not set.
        OSError: If a file cannot be written.
    """
    _prepare(folder, count, seed, size, is_forced=is_forced)
    edits: Iterable[tuple[Edit, str]] = iterate_edits(count, seed, objects=objects, split=split)
    for index, (edit, text) in enumerate(
        tqdm(edits, total=count, desc="edits", unit="pair", disable=is_quiet)
    ):
        path = folder / f"edit-{index:06d}.png"
        draw(edit.source, size).save(path.with_suffix(SOURCE_ENDING))
        facts = {
            "kind": edit.kind,
            "instruction": edit.instruction,
            "target": edit.caption,
            "answer": edit.answer,
        }
        path.with_suffix(".json").write_text(json.dumps(facts) + "\n", encoding="utf-8", newline="\n")
        _write(path, draw(edit.target, size), text)


def _write(path: Path, picture: Image.Image, text: str) -> None:
    """Writes a picture and, when that is whole, its text."""
    picture.save(path)
    path.with_suffix(".txt").write_text(text + "\n", encoding="utf-8", newline="\n")


def _prepare(folder: Path, count: int, seed: int, size: int, *, is_forced: bool) -> None:
    _check(folder, count, seed, size, is_forced=is_forced)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as err:
        raise SceneError(f"{folder} must be a folder that can be made, got {err}; name another") from err


def _check(folder: Path, count: int, seed: int, size: int, *, is_forced: bool) -> None:
    if count < 1:
        raise SceneError(f"count must be at least 1, got {count}")
    if seed < 0:
        raise SceneError(f"seed must be 0 or more, got {seed}")
    if not MIN_SIZE <= size <= _MAX_SIZE:
        raise SceneError(f"size must be {MIN_SIZE} to {_MAX_SIZE} pixels, got {size}")
    if folder.exists() and not folder.is_dir():
        raise SceneError(f"{folder} must be a folder, got a file; name another folder")
    if folder.exists() and not is_forced and any(folder.iterdir()):
        raise SceneError(f"{folder} must be empty, got a folder with files; name another or add --force")
