"""SIGTERM and Ctrl-C as a flag that long work asks for."""

from __future__ import annotations

import signal
import time
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StoppedError(Exception):
    """Work was left because a stop was asked for."""


class StopFlag:
    """Set by SIGTERM, SIGINT, or a time limit."""

    def __init__(self, seconds: float | None = None) -> None:
        """A flag that also sets itself `seconds` after now."""
        self.requested = False
        self._deadline = None if seconds is None else time.monotonic() + seconds

    def listen(self) -> None:
        """Makes SIGTERM and SIGINT set this flag instead of ending the process."""
        for number in SIGNALS:
            signal.signal(number, self._set)
        if hasattr(signal, "pthread_sigmask"):
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)

    def __bool__(self) -> bool:
        return self.requested or (self._deadline is not None and time.monotonic() > self._deadline)

    def check(self) -> None:
        """Raises: StoppedError if a stop was asked for."""
        if self:
            raise StoppedError

    def _set(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        self.requested = True
