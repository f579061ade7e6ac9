"""Local processes of one run: started and stopped together; none outlives the one that started them."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence

from training.cli import DONE, FAILED, STOPPED, fail
from training.stop import SIGNALS, StopFlag

POLL_SECONDS = 0.05
GRACE_SECONDS = 15.0
"""How long the others may take to end after one has failed."""
_PR_SET_PDEATHSIG = 1


def run_processes(count: int, arguments: Sequence[str], stop: StopFlag) -> int:
    """Exit code of `training.run` with `arguments` in `count` processes on this machine.

    They are in this process's group; a stop that is asked for here is handed on to them.
    """
    environment = {
        **os.environ,
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        "TORCH_CPP_LOG_LEVEL": os.environ.get("TORCH_CPP_LOG_LEVEL", "ERROR"),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or str(max(1, (os.cpu_count() or 1) // count)),
    }
    command = [sys.executable, "-m", "training.run", *arguments]
    with _signals_held():
        children = [
            subprocess.Popen(
                command,
                env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdin=subprocess.DEVNULL,
            )
            for rank in range(count)
        ]
    try:
        return _outcome(children, _first_failure(children, stop))
    finally:
        _kill(children)


def _first_failure(children: Sequence[subprocess.Popen[bytes]], stop: StopFlag) -> int | None:
    """Waits for all to end; the number of the one that failed before the others, if one did."""
    failed, deadline, is_told = None, float("inf"), False
    while True:
        codes = [child.poll() for child in children]
        if failed is None:
            bad = (rank for rank, code in enumerate(codes) if code not in (None, DONE, STOPPED))
            failed = next(bad, None)
            deadline = deadline if failed is None else time.monotonic() + GRACE_SECONDS
        if None not in codes:
            return failed
        if stop and not is_told:
            is_told = True
            for child in children:
                child.send_signal(signal.SIGTERM)
        if time.monotonic() > deadline:
            _kill(children)
        time.sleep(POLL_SECONDS)


def _outcome(children: Sequence[subprocess.Popen[bytes]], failed: int | None) -> int:
    """The exit code of all together."""
    codes = [child.returncode for child in children]
    if failed is None:
        return max(codes)
    if codes[failed] >= 0:
        return codes[failed]
    name = signal.Signals(-codes[failed]).name
    return fail(
        f"process {failed} of {len(codes)} must end by itself, got {name}; "
        "the same command continues the run from its newest checkpoint",
        FAILED,
    )


def _kill(children: Sequence[subprocess.Popen[bytes]]) -> None:
    for child in children:
        if child.poll() is None:
            child.kill()
            child.wait()


@contextlib.contextmanager
def _signals_held() -> Iterator[None]:
    """Processes started meanwhile hear of stops when `StopFlag.listen` is called in them, and not before."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def end_with(parent: int) -> None:
    """Lets this process end at once when the process `parent` that started it ends, however that ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        _end_without(parent)
    else:
        threading.Thread(target=_watch, args=(parent,), daemon=True).start()


def _watch(parent: int) -> None:
    while True:
        _end_without(parent)
        time.sleep(1)


def _end_without(parent: int) -> None:
    if os.getppid() != parent:
        os._exit(FAILED)
