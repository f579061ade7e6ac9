"""`training.run` and what goes wrong: mistakes in one line, full disks, the plan, runs in use."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch
from safetensors import SafetensorError

from tests.unit.training.workspace import (
    assert_equal_runs,
    copied,
    error_line,
    leftovers,
    run,
    settings,
    tree,
    weights,
    write_config,
)
from training import launch, locks


def test_an_undecodable_image_stops_the_run_or_is_listed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_config(tmp_path, train={"steps": 1})
    spoilt = tmp_path / "images" / "03.png"
    spoilt.write_bytes(spoilt.read_bytes()[:-200])
    (tmp_path / "images" / "05.txt").unlink()
    assert run(path) == 2
    assert "05.png: caption 05.txt must exist" in error_line(capsys)
    assert run(path, *settings("data.missing_caption=skip")) == 2
    assert "03.png: image must decode" in error_line(capsys)
    assert not (tmp_path / "runs").exists()
    assert run(path, *settings("data.missing_caption=skip", "data.on_error=skip")) == 0
    lines = (tmp_path / "runs" / "run" / "rejects.csv").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "file,reason"
    assert lines[1].endswith("05.png,caption 05.txt must exist")
    assert ",image must decode" in lines[2] or ',"image must decode' in lines[2]
    assert len(lines) == 3


MISTAKES = [
    (["encoders.vae=gone"], "error: encoders.vae: weights must be an existing file or folder"),
    (["encoders.text=gone"], "error: encoders.text: weights must be an existing file or folder"),
    (["model.weights=gone"], "error: model.weights: weights must be an existing file or folder"),
    (["model.preset=tinny"], "error: model.preset must be one of tiny, demo"),
    (["model.preset=demo"], "error: encoders.vae must be named for preset 'demo', got none"),
    (["model.overrides.dept=2"], "error: model.overrides: dept must be a field of XUTConfig"),
    (
        ["model.overrides.depth=x"],
        "error: model.overrides.depth must be a whole number as in the preset (2), got 'x'",
    ),
    (["model.overrides.dim=65"], "error: model.overrides: dim must be heads * dim_head"),
    (["model.overrides.a.b=1"], "error: model.overrides: "),
    (["model.overrides.enc_blocks=[1, x]"], "error: model.overrides: "),
    (["datasets.0.path=gone"], "error: datasets.0.path: gone must be a folder of images, got nothing there"),
    (
        ["optimizer.groups=[{pattern: zzz}]"],
        "error: optimizer.groups: pattern must match a trainable parameter",
    ),
    (["optimizer.name=muon"], "error: optimizer.groups: muon takes matrices only"),
    (["train.steps=0"], "error: --set train.steps must be greater than or equal to 1, got 0"),
]


@pytest.mark.parametrize("is_dry", [True, False])
@pytest.mark.parametrize(("assignments", "expected"), MISTAKES)
def test_a_mistake_is_one_line_and_writes_nothing(
    finished: Path,
    tmp_path: Path,
    assignments: list[str],
    expected: str,
    is_dry: bool,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = copied(finished, tmp_path)
    before = tree(tmp_path)
    arguments = [*settings("output.name=new", *assignments), *(["--dry-run"] if is_dry else [])]
    assert run(path, *arguments) == 2
    assert error_line(capsys).startswith(expected)
    assert tree(tmp_path) == before


def spoil_weights(path: Path, how: str) -> None:
    content = path.read_bytes()
    tensors = weights(path)
    if how == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "a web page":
        path.write_bytes(b"<html></html>")
    elif how == "header flipped":
        path.write_bytes(bytes([content[0] ^ 255]) + content[1:])
    elif how == "without a tensor":
        tensors.pop("ctx_proj.weight")
        safetensors.torch.save_file(tensors, path)
    elif how == "of another shape":
        tensors["ctx_proj.weight"] = torch.zeros(64, 48)
        safetensors.torch.save_file(tensors, path)
    else:
        safetensors.torch.save_file({"x": torch.zeros(2)}, path)


@pytest.mark.parametrize(
    "how",
    [
        "truncated",
        "empty",
        "a web page",
        "header flipped",
        "without a tensor",
        "of another shape",
        "of nothing known",
    ],
)
def test_weights_that_cannot_be_used_are_named_in_one_line(
    finished: Path, tmp_path: Path, how: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = copied(finished, tmp_path)
    start = tmp_path / "start.safetensors"
    shutil.copy(finished / "runs" / "run" / "final" / "model.safetensors", start)
    spoil_weights(start, how)
    for mode in ([], ["--dry-run"]):
        assert run(path, *settings("output.name=new", f"model.weights={start}"), *mode) == 2
        assert "start.safetensors" in error_line(capsys)
    assert not (tmp_path / "runs" / "new").exists()


def test_the_plan_is_one_json_object_and_nothing_is_written(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = copied(finished, tmp_path)
    before = tree(tmp_path)
    capsys.readouterr()
    assert (
        run(path, "--dry-run", "--json", *settings("output.name=new", f"cache.dir={tmp_path / 'cache'}")) == 0
    )
    captured = capsys.readouterr()
    plan = json.loads(captured.out)
    assert captured.out.count("\n") == 1
    assert captured.err == ""
    assert list(plan) == [
        "arch",
        "parameters",
        "trainable_parameters",
        "memory",
        "steps",
        "epochs",
        "images",
        "buckets",
        "warnings",
    ]
    assert list(plan["memory"]) == ["weights", "gradients", "optimizer", "ema", "activations", "total"]
    assert sum(bucket["images"] for bucket in plan["buckets"]) == plan["images"] == 9
    assert plan["epochs"] == pytest.approx(4 * 4 / 9)
    final = weights(finished / "runs" / "run" / "final" / "model.safetensors")
    assert plan["trainable_parameters"] == sum(tensor.numel() for tensor in final.values())
    assert tree(tmp_path) == before
    assert run(path, "--dry-run") == 0
    assert "9 images in 3 buckets" in capsys.readouterr().out


def test_json_without_dry_run_is_refused(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(finished / "run.yaml", "--json") == 2
    assert error_line(capsys) == "error: --json must come with --dry-run, got it alone; add --dry-run"


@pytest.mark.parametrize(
    ("package", "key"), [("tensorboard", "logging.tensorboard"), ("matplotlib", "logging.plots")]
)
def test_a_missing_package_is_named_before_anything_is_written(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    package: str,
    key: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = write_config(tmp_path)
    find = importlib.util.find_spec
    monkeypatch.setattr(
        launch.importlib.util, "find_spec", lambda name, *a: None if name == package else find(name, *a)
    )
    assert run(path, *settings(f"{key}=true")) == 2
    line = error_line(capsys)
    assert line.startswith(
        f"error: {key} must be false without the package {package}, got true; install flowcore[train]"
    )
    assert not (tmp_path / "runs").exists()


def test_a_full_disk_stops_the_run_and_it_continues_afterwards(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = copied(finished, tmp_path)
    save, calls = safetensors.torch.save_file, []

    def full(tensors: dict[str, torch.Tensor], file: Path, *rest: object, **more: object) -> None:
        calls.append(file)
        if len(calls) > 3:
            Path(file).write_bytes(b"half")
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        save(tensors, file, *rest, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    assert run(path, *settings("output.name=new")) == 1
    line = error_line(capsys)
    folder = tmp_path / "runs" / "new"
    assert str(folder / "checkpoints" / "step-00000004") in line
    assert "could not be written (No space left on device); make space" in line
    assert json.loads((folder / "status.json").read_text(encoding="utf-8"))["state"] == "failed"
    assert [p.name for p in (folder / "checkpoints").iterdir()] == ["step-00000002"]
    assert not leftovers(folder)
    monkeypatch.undo()
    assert run(path, *settings("output.name=new")) == 0
    assert_equal_runs(folder, finished / "runs" / "run")


def test_a_full_disk_at_the_end_is_a_failure_of_the_run(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from flowcore.weights import atomic

    path = copied(finished, tmp_path)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(atomic, "save_file", full)
    assert run(path, *settings("output.name=new")) == 1
    assert "model.safetensors" in error_line(capsys)
    monkeypatch.undo()
    assert run(path, *settings("output.name=new")) == 0
    assert_equal_runs(tmp_path / "runs" / "new", finished / "runs" / "run")


def test_a_loss_that_is_not_finite_fails_the_run_at_its_step(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = copied(finished, tmp_path)
    assert run(path, *settings("output.name=new", "optimizer.lr=1e30", "schedule.name=constant")) == 1
    line = error_line(capsys)
    assert line.startswith(("error: step 2: loss must be finite", "error: step 3: loss must be finite"))
    folder = tmp_path / "runs" / "new"
    assert json.loads((folder / "status.json").read_text(encoding="utf-8"))["state"] == "failed"
    assert not (folder / "final").exists()
    assert "nan" not in (folder / "metrics.csv").read_text(encoding="utf-8")


def test_a_run_folder_that_is_a_file_is_named(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = copied(finished, tmp_path)
    (tmp_path / "runs" / "new").write_text("x", encoding="utf-8")
    assert run(path, *settings("output.name=new")) == 2
    assert "output.name: " in error_line(capsys)


def test_a_run_in_use_is_refused(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = copied(finished, tmp_path)
    monkeypatch.setattr(locks, "_try_lock", lambda _: False)
    monkeypatch.setattr(locks, "POLL_SECONDS", 0)
    monkeypatch.setattr(locks.time, "monotonic", iter(range(0, 1000, 50)).__next__)
    assert run(path) == 2
    assert "another process uses this folder" in error_line(capsys)


def test_leftovers_of_a_killed_run_are_removed(finished: Path, tmp_path: Path) -> None:
    path = copied(finished, tmp_path)
    folder = tmp_path / "runs" / "run"
    (folder / "checkpoints" / ".tmp-9-1").mkdir()
    (folder / ".tmp-1-status.json").touch()
    assert run(path, *settings("train.steps=5")) == 0
    assert not leftovers(folder)


def test_another_number_of_threads_gives_a_warning(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = copied(finished, tmp_path)
    facts = tmp_path / "runs" / "run" / "run.json"
    facts.write_text(
        facts.read_text(encoding="utf-8").replace('"threads": 1', '"threads": 7'), encoding="utf-8"
    )
    capsys.readouterr()
    assert run(path, *settings("train.steps=5")) == 0
    assert "warning: the run had 7 threads, now 1" in capsys.readouterr().err
