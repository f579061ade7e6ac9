"""What all command lines share: one-line errors, exit codes, `--debug`."""

from __future__ import annotations

import argparse
import difflib
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

from flowcore.command_line import short_warnings
from flowcore.errors import FlowCoreError
from training.files import FULL_DISK, RunError
from training.stop import StoppedError

DONE, FAILED, UNUSABLE, STOPPED = 0, 1, 2, 3
MAX_LINE = 490


class ToldError(Exception):
    """Another process of the run tells why it ends; this one ends with the exit code alone."""

    def __init__(self, code: int) -> None:
        """An end with exit code `code`."""
        super().__init__(code)
        self.code = code


def run_command(command: Callable[[argparse.Namespace], int], arguments: argparse.Namespace) -> int:
    """Exit code of a command; a user's error becomes one line, after its traceback with `--debug`."""
    try:
        with short_warnings():
            return command(arguments)
    except (StoppedError, KeyboardInterrupt):
        return STOPPED
    except ToldError as err:
        return err.code
    except (FlowCoreError, OSError, MemoryError, RuntimeError, ModuleNotFoundError) as err:
        message, code = verdict(err)
        if not message:
            raise
        if arguments.debug:
            traceback.print_exc()
        return fail(message, code)


def verdict(err: Exception) -> tuple[str, int]:
    """Message and exit code of an error that a user can repair; no message for any other."""
    if isinstance(err, FlowCoreError):
        return str(err), FAILED if isinstance(err, RunError) else UNUSABLE
    if isinstance(err, OSError):
        remedy = "; make space and start the same command again" if err.errno in FULL_DISK else ""
        return f"{err.filename or 'file'}: {err.strerror or err}{remedy}", FAILED
    if isinstance(err, ModuleNotFoundError):
        package = (err.name or "").partition(".")[0]
        if package in ("", "flowcore", "training"):
            return "", FAILED
        return f"package {package} must be installed, found none; install flowcore[train]", UNUSABLE
    text = str(err)
    if isinstance(err, MemoryError) or "out of memory" in text or "can't allocate memory" in text:
        remedy = "lower train.micro_batch_size or set train.gradient_checkpointing to true"
        return f"memory must suffice for the run, got none left ({text[:120]}); {remedy}", FAILED
    return "", FAILED


def fail(message: str, code: int) -> int:
    """Prints `error: message` on stderr and returns the exit code."""
    line = " ".join(message.split())
    sys.stderr.write(f"error: {line[:MAX_LINE]}\n")
    return code


class Parser(argparse.ArgumentParser):
    """Argument parser whose errors are one `error:` line that names the nearest option."""

    def error(self, message: str) -> NoReturn:
        """Prints the error and leaves with the exit code of unusable input."""
        known = [option for action in self._actions for option in action.option_strings]
        for word in message.split():
            option = word.partition("=")[0].rstrip(":")
            near = difflib.get_close_matches(option, known, n=1)
            if option.startswith("-") and option not in known and near:
                message += f"; nearest valid option is {near[0]}"
        sys.exit(fail(message, UNUSABLE))


def parser(name: str, description: str) -> Parser:
    """Argument parser of `python -m training.<name>` with `--debug`."""
    made = Parser(prog=f"python -m training.{name}", description=description)
    made.add_argument("--debug", action="store_true", help="show tracebacks")
    return made
