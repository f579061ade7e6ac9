"""Checkpoints that are complete or absent, and exact resume from the newest sound one."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from flowcore.errors import CheckpointError
from training.files import rename, save_tensors, sha256, sync, write_failure

_MANIFEST = "manifest.json"
FREE_SHARE = 1.1


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A sound checkpoint on disk."""

    path: Path
    step: int
    facts: Mapping[str, int]

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Tensors of one part, for example `weights`; copies, so that the file may be deleted."""
        return {name: t.clone() for name, t in load_file(self.path / f"{name}.safetensors").items()}

    def has(self, name: str) -> bool:
        """Whether the checkpoint holds a part."""
        return (self.path / f"{name}.safetensors").exists()


def save_checkpoint(
    folder: Path, step: int, parts: Mapping[str, Mapping[str, Tensor]], facts: Mapping[str, int], keep: int
) -> Path:
    """Writes `folder/step-NNNNNNNN` with one safetensors file a part, then drops all but the `keep` newest.

    Raises: RunError if the disk is full or a write fails; earlier checkpoints are untouched.
    """
    target = folder / f"step-{step:08d}"
    aside = folder / f".tmp-{step}-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _need_space(folder, parts)
        _write(aside, step, parts, facts)
        if target.exists():
            _remove(target)
        rename(aside, target)
        sync(folder)
        for old in [path for path in _folders(folder) if path.name <= target.name][keep:]:
            _remove(old)
    except OSError as err:
        shutil.rmtree(aside, ignore_errors=True)
        raise write_failure(err, target) from err
    return target


def newest_checkpoint(folder: Path, warnings: list[str]) -> Checkpoint | None:
    """Newest checkpoint whose every file matches its checksum; each damaged one adds a line to `warnings`.

    Raises: CheckpointError if there are checkpoints but none is sound.
    """
    if not folder.is_dir():
        return None
    folders = _folders(folder)
    for path in folders:
        try:
            return read_checkpoint(path)
        except CheckpointError as err:
            warnings.append(f"warning: {err}; trying an older one")
    if folders:
        names = ", ".join(path.name for path in folders[:3])
        raise CheckpointError(f"{folder}: every checkpoint is damaged ({names}); remove it to start over")
    return None


def read_checkpoint(path: Path) -> Checkpoint:
    """Checks a checkpoint's files against its manifest.

    Raises: CheckpointError that names the damaged file.
    """
    try:
        manifest = _parse_manifest((path / _MANIFEST).read_text(encoding="utf-8"))
        files, step, facts = dict(manifest["files"]), int(manifest["step"]), manifest["facts"]
        differing = [name for name, expected in files.items() if sha256(path / name) != expected]
    except OSError as err:
        missing = Path(err.filename).name if err.filename else "a file"
        raise CheckpointError(f"{path}: {missing} cannot be read ({err.strerror})") from err
    except (LookupError, ValueError, TypeError, AttributeError) as err:
        raise CheckpointError(f"{path}: {_MANIFEST} is damaged ({err})") from err
    if differing:
        raise CheckpointError(f"{path}: {differing[0]} does not match its checksum")
    return Checkpoint(path, step, facts)


def _parse_manifest(text: str) -> dict[str, Any]:
    """The manifest's table. Raises: ValueError if the checksum in its last line is not that of the rest."""
    body, _, checksum = text.rpartition("\n")
    if hashlib.sha256(body.encode()).hexdigest() != checksum:
        raise ValueError("it does not match its checksum")
    table: dict[str, Any] = json.loads(body)
    return table


def _need_space(folder: Path, parts: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Raises: OSError before a write that would fill the disk."""
    size = sum(tensor.nbytes for tensors in parts.values() for tensor in tensors.values())
    if shutil.disk_usage(folder).free < size * FREE_SHARE:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))


def checkpoint_steps(folder: Path) -> dict[int, Path]:
    """Checkpoint folders by their step."""
    return {int(path.name.removeprefix("step-")): path for path in _folders(folder)}


def _folders(folder: Path) -> list[Path]:
    """Checkpoint folders, newest first."""
    return sorted((p for p in folder.glob("step-*") if p.is_dir()), reverse=True)


def _write(
    aside: Path, step: int, parts: Mapping[str, Mapping[str, Tensor]], facts: Mapping[str, int]
) -> None:
    aside.mkdir()
    files = {}
    for name, tensors in parts.items():
        path = aside / f"{name}.safetensors"
        save_tensors(tensors, path)
        files[path.name] = sha256(path)
    body = json.dumps({"step": step, "facts": dict(facts), "files": files})
    with (aside / _MANIFEST).open("w", encoding="utf-8", newline="") as file:
        file.write(body + "\n" + hashlib.sha256(body.encode()).hexdigest())
        file.flush()
        os.fsync(file.fileno())
    sync(aside)


def _remove(path: Path) -> None:
    """Deletes a checkpoint so that a kill in between leaves no half folder under its name."""
    aside = path.with_name(f".tmp-old-{path.name}")
    rename(path, aside)
    shutil.rmtree(aside)
