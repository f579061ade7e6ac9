"""Files that are complete or absent: written aside, synced, renamed."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from flowcore.errors import FlowCoreError

if TYPE_CHECKING:
    from torch import Tensor

FULL_DISK = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO})
WINDOWS_FULL_DISK = frozenset({39, 112})
SCANNER_SECONDS = 2.0


class RunError(FlowCoreError):
    """The run failed after it had begun (exit code 1)."""


def write_atomic(path: Path, text: str) -> None:
    """Replaces a text file in one step; an earlier one stays as it is if that fails."""
    aside = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    try:
        with aside.open("w", encoding="utf-8", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        rename(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def save_tensors(
    tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None
) -> None:
    """Writes a safetensors file and syncs it. Raises: OSError if the disk is full or the write fails."""
    import safetensors.torch
    from safetensors import SafetensorError

    try:
        plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        safetensors.torch.save_file(plain, path, dict(metadata) if metadata else None)
    except SafetensorError as err:
        raise _as_os_error(err) from err
    sync(path)


def _as_os_error(err: Exception) -> OSError:
    """The system's error that safetensors reports as text."""
    found = re.search(r"\(os error (\d+)\)", str(err))
    if not found:
        return OSError(errno.EIO, str(err))
    number = int(found[1])
    if sys.platform == "win32":
        number = errno.ENOSPC if number in WINDOWS_FULL_DISK else errno.EACCES
    return OSError(number, os.strerror(number))


def rename(aside: Path, target: Path) -> None:
    """Moves a finished file or folder to its name; on Windows waits for a scanner that holds the old one."""
    deadline = time.monotonic() + SCANNER_SECONDS
    while True:
        try:
            aside.replace(target)
        except PermissionError:
            if os.name != "nt" or time.monotonic() > deadline:
                raise
            time.sleep(0.05)
        else:
            return


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
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_leftovers(folder: Path) -> None:
    """Deletes what a killed writer left at any depth: names that start with `.tmp`."""
    for path in sorted(folder.rglob(".tmp*")):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def write_failure(err: OSError, target: Path | str) -> RunError:
    """The one-line error for a write that failed, with a remedy where the disk is full."""
    remedy = "; make space and start the same command again" if err.errno in FULL_DISK else ""
    return RunError(f"{target}: could not be written ({err.strerror or err}){remedy}")
