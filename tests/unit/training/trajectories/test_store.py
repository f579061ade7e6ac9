"""Folders of trajectories: equal bytes whatever ended the writer, and what is said of folders that differ."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from flowcore.errors import ConfigError
from flowcore.vae.latent_spec import LatentSpec
from training.data.stored import StoredFiles
from training.data.trajectories import draw_start, scan_trajectories
from training.files import RunError
from training.stop import StopFlag
from training.trajectories import store
from training.trajectories.making import Job, Sources, make_records

SPACE = LatentSpec(name="tiny", channels=2, downscale=8, mean=(0.0, 0.0), std=(1.0, 1.0))
PROMPTS = ["a", "b \u00e9", "c"]


class FakeTeacher:
    """Halves the noise, or divides it by other steps."""

    size, space = (16, 8), SPACE
    facts: Mapping[str, Any] = {"teacher": "fake", "steps": 1}

    def __init__(self) -> None:
        self.calls: list[list[str]] = []

    def flops(self, steps: int | None = None) -> float:
        return 2.0 * (steps or 4)

    def latents(self, captions: Sequence[str], seeds: Sequence[int], steps: int | None = None) -> Tensor:
        self.calls.append(list(captions))
        return torch.stack([draw_start(seed, (2, 1, 2)) / (steps or 2) for seed in seeds])

    def pictures(
        self, captions: Sequence[str], seeds: Sequence[int], numbers: Sequence[int], steps: int | None = None
    ) -> Tensor:
        raise NotImplementedError


class Killed(BaseException):
    """What ends the process in the middle of a write."""


def job(count: int = 5, **changes: Any) -> Job:
    values: dict[str, Any] = {
        "maker": FakeTeacher(), "prompts": PROMPTS, "count": count, "seed": 1, "batch": 2,
        "dtype": "float32", "vae": None, **changes,
    }  # fmt: skip
    return Job(**values)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two records a shard."""
    monkeypatch.setattr(store, "SHARD_RECORDS", 2)


def test_records_are_what_the_teacher_made_of_their_noise(tmp_path: Path) -> None:
    assert make_records(tmp_path / "out", job(), StopFlag())
    assert sorted(files(tmp_path / "out")) == [
        "00000.safetensors", "00001.safetensors", "00002.safetensors", "index.jsonl",
    ]  # fmt: skip
    header, *records = map(json.loads, (tmp_path / "out" / "index.jsonl").read_text("utf-8").splitlines())
    assert (header["coupling"], header["teacher"], header["size"]) == ("teacher", "fake", [16, 8])
    assert [record["caption"] for record in records] == ["a", "b \u00e9", "c", "a", "b \u00e9"]
    assert len({record["noise_seed"] for record in records}) == 5
    for record in records:
        found = load_file(tmp_path / "out" / record["shard"])[record["key"] + ".z0"]
        noise = torch.randn(
            (1, *record["noise_shape"]), generator=torch.Generator().manual_seed(record["noise_seed"])
        )[0]
        assert torch.equal(found, noise / 2)


def test_sources_are_what_the_teacher_made_of_the_same_noise(tmp_path: Path) -> None:
    teacher, sources = FakeTeacher(), Sources(steps=4, prompts=["d", "e", "f"])
    assert make_records(tmp_path, job(maker=teacher, sources=sources), StopFlag())
    assert teacher.calls == [["a", "b \u00e9"], ["d", "e"], ["c", "a"], ["f", "d"], ["b \u00e9"], ["e"]]
    _, *records = map(json.loads, (tmp_path / "index.jsonl").read_text("utf-8").splitlines())
    assert [record["source_caption"] for record in records] == ["d", "e", "f", "d", "e"]
    for record in records:
        tensors = load_file(tmp_path / record["shard"])
        assert torch.equal(tensors[record["key"] + ".source_z0"], tensors[record["key"] + ".z0"] / 2)
    kept = scan_trajectories(tmp_path, "datasets.0.path", StopFlag())
    both = scan_trajectories(tmp_path, "datasets.0.path", StopFlag(), edits=True)
    assert both[: len(kept)] == kept
    assert [sample.is_edit for sample in both] == [False] * 5 + [True] * 5
    files = StoredFiles()
    for plain, edit in zip(kept, both[len(kept) :], strict=True):
        assert (edit.caption, edit.key) == (plain.caption, f"{plain.key}.edit")
        read = files.read(edit)
        assert torch.equal(read["latents"], files.read(plain)["latents"])
        assert torch.equal(read["source_latents"], read["latents"] / 2)


def test_a_writer_killed_at_any_write_leaves_what_the_next_one_goes_on_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_records(tmp_path / "whole", job(3), StopFlag())
    expected = files(tmp_path / "whole")
    writers = {name: getattr(store, name) for name in ("rename", "save_tensors", "write_atomic")}
    left = 0

    def kill(function: Callable[..., None], *, after: bool) -> Callable[..., None]:
        def call(*arguments: object) -> None:
            nonlocal left
            left -= 1
            if left == 0 and not after:
                raise Killed
            function(*arguments)
            if left == 0:
                raise Killed

        return call

    for after in (False, True):
        for number in range(1, 30):
            folder = tmp_path / f"{after}-{number}"
            left = number
            with monkeypatch.context() as patch:
                for name, writer in writers.items():
                    patch.setattr(store, name, kill(writer, after=after))
                try:
                    make_records(folder, job(3), StopFlag())
                    was_killed = False
                except Killed:
                    was_killed = True
            assert make_records(folder, job(3), StopFlag())
            assert files(folder) == expected, (after, number)
            if not was_killed:
                break
        assert number == 14  # 5 files written and renamed, 3 indexes


def test_a_stop_keeps_finished_batches_and_batches_do_not_depend_on_it(tmp_path: Path) -> None:
    class Stopping(FakeTeacher):
        def latents(self, captions: Sequence[str], seeds: Sequence[int], steps: int | None = None) -> Tensor:
            stop.requested = True
            return super().latents(captions, seeds, steps)

    stop, teacher = StopFlag(), FakeTeacher()
    assert not make_records(tmp_path, job(maker=Stopping()), stop)
    (tmp_path / "00000.safetensors").unlink()
    assert make_records(tmp_path, job(maker=teacher), StopFlag())
    assert teacher.calls == [["a", "b \u00e9"], ["c", "a"], ["b \u00e9"]]
    teacher.calls.clear()
    assert make_records(tmp_path, job(maker=teacher), StopFlag())
    assert teacher.calls == []


def test_more_records_are_added_to_a_finished_folder(tmp_path: Path) -> None:
    make_records(tmp_path / "grown", job(3), StopFlag())
    make_records(tmp_path / "grown", job(5), StopFlag())
    make_records(tmp_path / "whole", job(5), StopFlag())
    assert files(tmp_path / "grown") == files(tmp_path / "whole")
    with pytest.raises(ConfigError, match=r"--count must be at least 5, which .* holds, got 4"):
        make_records(tmp_path / "grown", job(4), StopFlag())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 2}, "holds trajectories with seed 1, got 2"),
        ({"dtype": "float16"}, 'holds trajectories with dtype "float32", got "float16"'),
        ({"prompts": ["a"]}, "holds trajectories with captions "),
        ({"sources": Sources(steps=4, prompts=None)}, "holds trajectories with sources null, got "),
    ],
)
def test_a_folder_of_another_provenance_is_refused(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    make_records(tmp_path, job(), StopFlag())
    before = files(tmp_path)
    with pytest.raises(ConfigError, match=message):
        make_records(tmp_path, job(**changes), StopFlag())
    assert files(tmp_path) == before


def test_a_folder_of_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"must be empty or hold trajectories, got mine\.txt"):
        make_records(tmp_path, job(), StopFlag())
    (tmp_path / "index.jsonl").write_text("mine")
    with pytest.raises(ConfigError, match=r"index\.jsonl must be the index of trajectories"):
        make_records(tmp_path, job(), StopFlag())
    with pytest.raises(ConfigError, match="must be a folder, got a file"):
        make_records(tmp_path / "mine.txt", job(), StopFlag())


@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_damaged_shard_is_made_again(
    damage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_records(tmp_path, job(), StopFlag())
    expected, path = files(tmp_path), tmp_path / "00001.safetensors"
    content = path.read_bytes()
    if damage == "flip":
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "cut":
        path.write_bytes(content[:40])
    else:
        path.unlink()
    with pytest.raises(Exception, match=r"00001\.safetensors must be as it was written"):
        scan_trajectories(tmp_path, "datasets.0.path", StopFlag())
    make_records(tmp_path, job(), StopFlag())
    assert files(tmp_path) == expected
    warned = "00001.safetensors: damaged file; its records are made again" in capsys.readouterr().err
    assert warned == (damage != "remove")


def test_latents_that_are_not_finite_are_named(tmp_path: Path) -> None:
    class Broken(FakeTeacher):
        def latents(self, captions: Sequence[str], seeds: Sequence[int], steps: int | None = None) -> Tensor:
            return super().latents(captions, seeds, steps) + 1e6

    with pytest.raises(RunError, match=r"latents of record 0 \('a'\) must be finite in float16"):
        make_records(tmp_path, job(maker=Broken(), dtype="float16"), StopFlag())


def test_a_plan_is_arithmetic() -> None:
    plan = job(count=600, dtype="float16").plan(tflops=2e-9)
    assert plan.latents == (2, 1, 2)
    assert (plan.record_bytes, plan.total_bytes, plan.captions) == (8, 4800, 3)
    assert plan.hours == pytest.approx(600 * 8 / 2000 / 3600)
    plan = job(count=600, dtype="float16", sources=Sources(steps=1, prompts=None)).plan(tflops=2e-9)
    assert (plan.record_bytes, plan.record_flops) == (16, 8 + 2)
