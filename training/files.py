"""Files that are complete or absent: written aside, synced, renamed."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from pathlib import Path

from flowcore.errors import FlowCoreError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}


class RunError(FlowCoreError):
    """The run failed after it had begun (exit code 1)."""


def write_atomic(path: Path, text: str) -> None:
    """Replaces a text file in one step."""
    aside = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    with aside.open("w", encoding="utf-8", newline="") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def sync(path: Path) -> None:
    """Forces a file's content (or, where the system can, a folder's names) to the disk."""
    if path.is_dir() and os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY if os.name != "nt" or path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_leftovers(folder: Path) -> None:
    """Deletes what a killed writer left beside its target (names that start with `.tmp-`)."""
    for path in folder.glob(".tmp-*"):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def write_failure(err: OSError, target: Path | str) -> RunError:
    """The one-line error for a write that failed, with a remedy where the disk is full."""
    remedy = "; make space and start the same command again" if err.errno in _FULL else ""
    return RunError(f"{target}: could not be written ({err.strerror or err}){remedy}")
