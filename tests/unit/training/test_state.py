"""Checkpoints: complete or absent, every damage noticed, the older one used."""

import errno
import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from flowcore.errors import CheckpointError
from training.files import RunError
from training.state import newest_checkpoint, read_checkpoint, save_checkpoint

MANIFEST = "manifest.json"


def parts(step: int) -> dict[str, dict[str, Tensor]]:
    return {
        "weights": {"a": torch.full((5,), float(step)), "b": torch.tensor(step)},
        "ema": {"a": torch.ones(3)},
    }


def save(folder: Path, *steps: int, keep: int = 10) -> list[Path]:
    return [save_checkpoint(folder, step, parts(step), {"ema_updates": step}, keep) for step in steps]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_checkpoint_gives_back_what_was_saved(tmp_path: Path) -> None:
    (path,) = save(tmp_path / "checkpoints", 7)
    assert path.name == "step-00000007"
    assert names(path) == ["ema.safetensors", MANIFEST, "weights.safetensors"]
    checkpoint = read_checkpoint(path)
    assert (checkpoint.step, checkpoint.facts) == (7, {"ema_updates": 7})
    found = checkpoint.tensors("weights")
    assert torch.equal(found["a"], torch.full((5,), 7.0))
    assert found["b"].item() == 7


def test_tensors_outlive_their_file(tmp_path: Path) -> None:
    (path,) = save(tmp_path, 1)
    found = read_checkpoint(path).tensors("weights")
    (path / "weights.safetensors").write_bytes(b"\0" * 4096)
    shutil.rmtree(path)
    assert torch.equal(found["a"], torch.ones(5))


def test_views_and_shared_tensors_are_saved(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    tensors = {"t": base.T, "row": base[1], "p": torch.nn.Parameter(base.clone())}
    found = read_checkpoint(save_checkpoint(tmp_path, 1, {"weights": tensors}, {}, 1)).tensors("weights")
    assert torch.equal(found["t"], base.T)
    assert torch.equal(found["row"], base[1])


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    save(tmp_path, 1, 2, 3, 4, keep=2)
    assert names(tmp_path) == ["step-00000003", "step-00000004"]


def test_a_newer_damaged_one_does_not_crowd_out_the_one_just_saved(tmp_path: Path) -> None:
    save(tmp_path, 4, 10)
    (tmp_path / "step-00000010" / MANIFEST).write_bytes(b"")
    save(tmp_path, 6, keep=1)
    warnings: list[str] = []
    found = newest_checkpoint(tmp_path, warnings)
    assert found is not None
    assert found.step == 6
    assert names(tmp_path) == ["step-00000006", "step-00000010"]


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    save(tmp_path, 3)
    (tmp_path / "step-00000003" / "weights.safetensors").write_bytes(b"")
    save(tmp_path, 3)
    assert read_checkpoint(tmp_path / "step-00000003").step == 3


def test_none_is_found_where_none_is(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path / "gone", []) is None
    (tmp_path / ".tmp-3-1").mkdir()
    assert newest_checkpoint(tmp_path, []) is None


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 4
    path.write_bytes(content)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-3]),
    "emptied": lambda path: path.write_bytes(b""),
    "first bit flipped": lambda path: flip(path, 0),
    "middle bit flipped": lambda path: flip(path, path.stat().st_size // 2),
    "last bit flipped": lambda path: flip(path, -1),
    "garbage": lambda path: path.write_bytes(os.urandom(300)),
    "removed": lambda path: path.unlink(),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("how", DAMAGE)
@pytest.mark.parametrize("name", ["weights.safetensors", "ema.safetensors", MANIFEST])
def test_a_damaged_newest_checkpoint_is_named_once_and_the_older_one_used(
    tmp_path: Path, name: str, how: str
) -> None:
    save(tmp_path, 2, 4)
    DAMAGE[how](tmp_path / "step-00000004" / name)
    warnings: list[str] = []
    found = newest_checkpoint(tmp_path, warnings)
    assert found is not None
    assert found.step == 2
    assert len(warnings) == 1
    assert warnings[0].startswith(f"warning: {tmp_path / 'step-00000004'}: ")
    assert "\n" not in warnings[0]
    assert names(tmp_path) == ["step-00000002", "step-00000004"]  # nothing is deleted
    with pytest.raises(CheckpointError, match=r"step-00000004: "):
        read_checkpoint(tmp_path / "step-00000004")


def test_an_empty_folder_and_a_removed_one(tmp_path: Path) -> None:
    save(tmp_path, 2, 4)
    shutil.rmtree(tmp_path / "step-00000004")
    (tmp_path / "step-00000004").mkdir()
    warnings: list[str] = []
    found = newest_checkpoint(tmp_path, warnings)
    assert found is not None
    assert (found.step, len(warnings)) == (2, 1)


def test_a_manifest_that_fits_its_checksum_must_still_be_one(tmp_path: Path) -> None:
    (path,) = save(tmp_path, 2)
    for body in ("[]", "{}", '{"files": {}, "step": "x", "facts": {}}', '{"files": 3}', "null"):
        (path / MANIFEST).write_text(body + "\n" + hashlib.sha256(body.encode()).hexdigest(), "utf-8")
        with pytest.raises(CheckpointError, match=r"step-00000002: manifest\.json is damaged"):
            read_checkpoint(path)


def test_all_damaged_is_an_error_that_names_them(tmp_path: Path) -> None:
    for path in save(tmp_path, 2, 4):
        (path / "weights.safetensors").write_bytes(b"")
    warnings: list[str] = []
    with pytest.raises(
        CheckpointError, match=r"every checkpoint is damaged \(step-00000004, step-00000002\)"
    ):
        newest_checkpoint(tmp_path, warnings)
    assert len(warnings) == 2


def full_disk(tensors: object, path: Path, metadata: object) -> None:
    del tensors, metadata
    path.write_bytes(b"half")
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


def no_quota(tensors: object, path: Path, metadata: object) -> None:
    del tensors, metadata
    raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT), str(path))


@pytest.mark.parametrize("fault", [full_disk, no_quota])
def test_a_failed_write_leaves_earlier_checkpoints_and_no_half_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Callable[[object, Path, object], None]
) -> None:
    save(tmp_path, 2)
    monkeypatch.setattr(safetensors.torch, "save_file", fault)
    with pytest.raises(RunError, match=r"step-00000004: could not be written \(.+\); make space and start"):
        save(tmp_path, 4, keep=1)
    assert names(tmp_path) == ["step-00000002"]
    monkeypatch.undo()
    save(tmp_path, 4, keep=1)
    assert names(tmp_path) == ["step-00000004"]


def test_too_little_space_is_noticed_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 2)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 99, 1))
    monkeypatch.setattr(safetensors.torch, "save_file", lambda *_: pytest.fail("written"))
    with pytest.raises(RunError, match=r"step-00000004: could not be written \(No space left on device\)"):
        save(tmp_path, 4)
    assert names(tmp_path) == ["step-00000002"]


@pytest.mark.skipif(os.name == "nt", reason="needs a file-size limit of the system")
def test_a_file_size_limit_is_an_error_like_a_full_disk(tmp_path: Path) -> None:
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
    try:
        with pytest.raises(
            RunError, match=r"step-00000001: could not be written \(File too large\); make space"
        ):
            save_checkpoint(tmp_path, 1, {"weights": {"a": torch.zeros(5000)}}, {}, 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert names(tmp_path) == []
