"""What all command lines share: one-line errors, exit codes, `--debug`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

from flowcore.errors import FlowCoreError
from training.files import RunError, write_failure
from training.stop import Stopped

DONE, FAILED, UNUSABLE, STOPPED = 0, 1, 2, 3


def run_command(command: Callable[[argparse.Namespace], int], arguments: argparse.Namespace) -> int:
    """Exit code of a command; a user's error becomes one `error:` line unless `--debug` asks for the traceback."""
    try:
        return command(arguments)
    except Stopped:
        return STOPPED
    except FlowCoreError as err:
        if arguments.debug:
            raise
        return fail(str(err), FAILED if isinstance(err, RunError) else UNUSABLE)
    except OSError as err:
        if arguments.debug:
            raise
        return fail(str(write_failure(err, err.filename or "file")), FAILED)
    except KeyboardInterrupt:
        return STOPPED


def fail(message: str, code: int) -> int:
    """Prints `error: message` on stderr and returns the exit code."""
    line = " ".join(message.split())
    sys.stderr.write(f"error: {line[:490]}\n")
    return code


def parser(name: str, description: str) -> argparse.ArgumentParser:
    """Argument parser of `python -m training.<name>` with `--debug`."""
    made = argparse.ArgumentParser(prog=f"python -m training.{name}", description=description)
    made.add_argument("--debug", action="store_true", help="show tracebacks")
    return made
