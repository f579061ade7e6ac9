"""Files that are complete or absent."""

import errno
import os
from pathlib import Path

import pytest
import safetensors.torch
import torch
from safetensors import SafetensorError

from training import files
from training.files import remove_leftovers, rename, save_tensors, sha256, write_atomic, write_failure


def test_text_is_written_as_it_is(tmp_path: Path) -> None:
    write_atomic(tmp_path / "a", "one\ntwo\r\n")
    assert (tmp_path / "a").read_bytes() == b"one\ntwo\r\n"
    write_atomic(tmp_path / "a", "new")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_text(encoding="utf-8") == "new"


def test_a_failed_write_leaves_the_old_text_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_atomic(tmp_path / "a", "old")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomic(tmp_path / "a", "new")
    assert {path.name: path.read_text(encoding="utf-8") for path in tmp_path.iterdir()} == {"a": "old"}


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("Error while serializing: I/O error: No space left on device (os error 28)", errno.ENOSPC),
        ("Error while serializing: I/O error: Permission denied (os error 13)", errno.EACCES),
        ("something else", errno.EIO),
    ],
)
@pytest.mark.skipif(os.name == "nt", reason="error numbers of Windows differ")
def test_errors_of_safetensors_become_the_system_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, number: int
) -> None:
    def fail(*_: object) -> None:
        raise SafetensorError(text)

    monkeypatch.setattr(safetensors.torch, "save_file", fail)
    with pytest.raises(OSError) as caught:  # noqa: PT011 - its number is looked at
        save_tensors({"a": torch.zeros(1)}, tmp_path / "a")
    assert caught.value.errno == number


@pytest.mark.skipif(os.name == "nt", reason="Windows waits before it gives up")
def test_a_name_that_cannot_be_taken_is_an_error_at_once(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "x").touch()
    (tmp_path / "a").touch()
    with pytest.raises(OSError, match="folder"):
        rename(tmp_path / "a", tmp_path / "folder")


def test_a_scanner_that_holds_the_file_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attempts = []

    class Held:
        def replace(self, target: Path) -> None:
            attempts.append(target)
            if len(attempts) < 3:
                raise PermissionError(errno.EACCES, "held")

    monkeypatch.setattr(files.os, "name", "nt")
    rename(Held(), tmp_path)  # type: ignore[arg-type]
    assert len(attempts) == 3
    monkeypatch.setattr(files, "SCANNER_SECONDS", -1.0)
    attempts.clear()
    with pytest.raises(PermissionError):
        rename(Held(), tmp_path)  # type: ignore[arg-type]


def test_sha256_of_known_content(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_leftovers_are_removed_at_any_depth_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / ".tmp-3-77").mkdir(parents=True)
    (tmp_path / "checkpoints" / ".tmp-3-77" / "weights").touch()
    (tmp_path / "plots").mkdir()
    (tmp_path / "plots" / ".tmp-loss.png").touch()
    (tmp_path / "plots" / "loss.png").touch()
    remove_leftovers(tmp_path)
    found = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*"))
    assert found == ["checkpoints", "plots", "plots/loss.png"]


@pytest.mark.parametrize(
    ("number", "is_full"),
    [(errno.ENOSPC, True), (errno.EFBIG, True), (errno.EIO, True), (errno.EACCES, False)],
)
def test_a_full_disk_has_a_remedy(number: int, is_full: bool) -> None:
    text = str(write_failure(OSError(number, os.strerror(number)), "place"))
    assert text.startswith(f"place: could not be written ({os.strerror(number)})")
    assert text.endswith("; make space and start the same command again") == is_full
