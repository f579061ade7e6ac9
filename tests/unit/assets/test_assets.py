"""Bundled weights by name."""

from pathlib import Path

import pytest

from flowcore import assets
from flowcore.errors import CheckpointError


def test_every_listed_name_is_a_file() -> None:
    for name in assets.list_builtin():
        assert assets.builtin(name).is_file()
        assert assets.resolve(name) == assets.builtin(name)


def test_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(CheckpointError, match=r"bundled weights must be one of \(.*\), got 'nothing'"):
        assets.builtin("nothing")
    with pytest.raises(CheckpointError, match="existing file or folder or a bundled name"):
        assets.resolve("nothing")


def test_a_name_cannot_leave_the_folder() -> None:
    with pytest.raises(CheckpointError):
        assets.builtin("../vae")


def test_a_users_own_file_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "xut-demo").write_bytes(b"mine")
    assert assets.resolve("xut-demo") == Path("xut-demo")
