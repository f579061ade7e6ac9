"""What every command of the package shares: exit codes, and errors on one line."""

import argparse
from collections.abc import Callable
from typing import NoReturn

DONE, FAILED, UNUSABLE = 0, 1, 2

Command = Callable[[argparse.Namespace], int]


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong, on one line, and exit with 2."""
        self.exit(UNUSABLE, f"error: {' '.join(message.split())}; see python -m flowcore --help\n")
