"""Folders held by one process at a time."""

import os
from pathlib import Path

import pytest

from flowcore.errors import ConfigError
from tests.support import run_python
from training import locks
from training.locks import locked
from training.stop import StopFlag, StoppedError


@pytest.fixture(autouse=True)
def _temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lock files lie below the test's folder."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(locks.tempfile, "gettempdir", lambda: str(tmp_path / "temporary"))


def take(folder: Path, purpose: str = "run", stop: StopFlag | None = None, seconds: float = 0) -> None:
    with locked(folder, purpose, StopFlag() if stop is None else stop, seconds):
        assert not folder.exists()


def test_a_held_folder_is_refused_after_the_wait(tmp_path: Path) -> None:
    with locked(tmp_path / "run", "run", StopFlag()):
        with pytest.raises(
            ConfigError, match=r"run: another process uses this folder; wait for it or stop it"
        ):
            take(tmp_path / "run")
        take(tmp_path / "run", "cache")
        take(tmp_path / "other")


def test_a_folder_is_free_again_afterwards_and_is_never_made(tmp_path: Path) -> None:
    take(tmp_path / "run")
    take(tmp_path / "run")


def test_another_way_to_the_same_folder_is_the_same_folder(tmp_path: Path) -> None:
    with locked(tmp_path / "run", "run", StopFlag()), pytest.raises(ConfigError):
        take(tmp_path / "x" / ".." / "run")


def test_a_stop_ends_the_wait(tmp_path: Path) -> None:
    stop = StopFlag()
    stop.requested = True
    with locked(tmp_path / "run", "run", StopFlag()), pytest.raises(StoppedError):
        take(tmp_path / "run", stop=stop, seconds=60)


@pytest.mark.skipif(os.name == "nt", reason="kills by signal")
def test_a_killed_holder_lets_go(tmp_path: Path) -> None:
    code = f"""
import os
from pathlib import Path
from training.locks import locked
from training.stop import StopFlag
with locked(Path({str(tmp_path / "run")!r}), "run", StopFlag()):
    os.kill(os.getpid(), 9)
"""
    assert run_python("-c", code, TMPDIR=str(tmp_path / "temporary")).returncode == -9
    assert len(list((tmp_path / "temporary").iterdir())) == 1
    take(tmp_path / "run")
    assert len(list((tmp_path / "temporary").iterdir())) == 1
