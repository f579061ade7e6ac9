"""Folders held by one process at a time. The lock ends with the process, however that ends."""

from __future__ import annotations

import contextlib
import hashlib
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from flowcore.errors import ConfigError
from training.stop import StopFlag

WAIT_SECONDS = 60.0
POLL_SECONDS = 0.2


@contextlib.contextmanager
def locked(folder: Path, purpose: str, stop: StopFlag, seconds: float = WAIT_SECONDS) -> Iterator[None]:
    """Holds a folder for this process; waits up to `seconds` for another one to let go of it.

    The lock is a file in the system's temporary folder, so that the folder itself need not exist.
    Raises: ConfigError if the folder stays in use; StoppedError.
    """
    name = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:24]
    path = Path(tempfile.gettempdir()) / f"flowcore-{purpose}-{name}.lock"
    with path.open("a+", encoding="utf-8") as file:
        deadline = time.monotonic() + seconds
        while not _try_lock(file.fileno()):
            stop.check()
            if time.monotonic() > deadline:
                raise ConfigError(f"{folder}: another process uses this folder; wait for it or stop it")
            time.sleep(POLL_SECONDS)
        yield


def _try_lock(handle: int) -> bool:
    """Takes an exclusive lock that ends with the process."""
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
