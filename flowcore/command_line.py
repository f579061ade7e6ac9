"""What every command of the package shares: exit codes, and errors and warnings on one line."""

import argparse
import contextlib
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from .errors import FlowCoreWarning

DONE, FAILED, UNUSABLE = 0, 1, 2

Command = Callable[[argparse.Namespace], int]


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong, on one line, and exit with 2."""
        self.exit(UNUSABLE, f"error: {' '.join(message.split())}; see python -m flowcore --help\n")


@contextlib.contextmanager
def short_warnings() -> Iterator[None]:
    """Print each warning of the project once, as `warning: ...` on stderr; others are as ever."""
    with warnings.catch_warnings():
        show = warnings.showwarning

        def show_short(message: Warning | str, category: type[Warning], *place: Any, **rest: Any) -> None:
            if issubclass(category, FlowCoreWarning):
                sys.stderr.write(f"warning: {message}\n")
            else:
                show(message, category, *place, **rest)

        warnings.showwarning = show_short
        warnings.simplefilter("once", FlowCoreWarning)
        yield
