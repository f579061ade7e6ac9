"""Writes captioned scenes as an ordinary folder of pictures with same-named text files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from .captions import caption_scene
from .draw import MIN_SIZE, draw
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
    _check(folder, count, seed, size, is_forced=is_forced)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as err:
        raise SceneError(f"{folder} must be a folder that can be made, got {err}; name another") from err
    scenes: Iterable[tuple[Scene, str]] = iterate_scenes(count, seed, objects=objects, split=split)
    for index, (scene, caption) in enumerate(
        tqdm(scenes, total=count, desc="scenes", unit="image", disable=is_quiet)
    ):
        path = folder / f"scene-{index:06d}.png"
        draw(scene, size).save(path)
        path.with_suffix(".txt").write_text(
            caption + "\n", encoding="utf-8", newline="\n"
        )  # last: picture is whole


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
