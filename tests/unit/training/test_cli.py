"""Exit codes and error lines that all commands share."""

import argparse
import errno
from pathlib import Path

import pytest

from flowcore.errors import CheckpointError, ConfigError
from tests.unit.training.workspace import error_line
from training.cli import parser, run_command
from training.data.sample import DataError
from training.files import RunError
from training.stop import StoppedError


def outcome(err: BaseException | None, debug: bool = False) -> int:
    def command(arguments: argparse.Namespace) -> int:
        del arguments
        if err:
            raise err
        return 0

    return run_command(command, argparse.Namespace(debug=debug))


@pytest.mark.parametrize(
    ("err", "code", "expected"),
    [
        (ConfigError("a must be b,\n  got c"), 2, "error: a must be b, got c"),
        (CheckpointError("x"), 2, "error: x"),
        (DataError("x"), 2, "error: x"),
        (RunError("step 3: loss must be finite"), 1, "error: step 3: loss must be finite"),
        (OSError(errno.EACCES, "Permission denied", "/x"), 1, "error: /x: Permission denied"),
        (OSError(errno.ENOSPC, "No space left"), 1, "error: file: No space left; make space and start"),
        (MemoryError(), 1, "error: memory must suffice for the run, got none left"),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), 1, "error: memory must suffice"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 1, "error: memory must"),
        (
            ModuleNotFoundError("No module named 'yaml.x'", name="yaml.x"),
            2,
            "error: package yaml must be installed, found none; install flowcore[train]",
        ),
        (ConfigError("x" * 1000), 2, "error: xxx"),
    ],
)
def test_an_error_is_one_line_and_a_code(
    err: Exception, code: int, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert outcome(err) == code
    assert error_line(capsys).startswith(expected)


def test_debug_shows_the_traceback_and_keeps_line_and_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert outcome(RunError("x"), debug=True) == 1
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert err.splitlines()[-1] == "error: x"
    assert outcome(ConfigError("y"), debug=True) == 2


@pytest.mark.parametrize("err", [StoppedError(), KeyboardInterrupt()])
def test_a_stop_has_a_code_of_its_own(err: BaseException) -> None:
    assert outcome(err) == 3


@pytest.mark.parametrize(
    "err", [RuntimeError("a bug"), ModuleNotFoundError("x", name="training.x"), KeyError("x"), TypeError("x")]
)
def test_a_mistake_of_the_program_is_not_dressed_up(err: Exception) -> None:
    with pytest.raises(type(err)):
        outcome(err)


def test_no_error_is_no_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert outcome(None) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "error: the following arguments are required: folder"),
        (["x", "--dry-rum"], "error: unrecognized arguments: --dry-rum; nearest valid option is --dry-run"),
        (["x", "--count", "many"], "error: argument --count: invalid int value: 'many'"),
        (["x", "y"], "error: unrecognized arguments: y"),
    ],
)
def test_wrong_arguments_are_one_line(
    arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    made = parser("x", "y")
    made.add_argument("folder", type=Path)
    made.add_argument("--dry-run", action="store_true")
    made.add_argument("--count", type=int)
    with pytest.raises(SystemExit) as caught:
        made.parse_args(arguments)
    assert caught.value.code == 2
    assert capsys.readouterr().err == expected + "\n"
