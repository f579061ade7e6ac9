"""`training.run` as a user starts it: outputs, and continuing a run."""

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from safetensors import safe_open

from flowcore.weights.checkpoint import load_model
from tests.unit.training.workspace import (
    assert_equal_runs,
    copied,
    error_line,
    leftovers,
    metrics,
    run,
    settings,
    tree,
    weights,
    write_config,
)


def test_a_run_leaves_what_it_promises(finished: Path) -> None:
    folder = finished / "runs" / "run"
    names = sorted(path.name for path in folder.iterdir())
    assert names == [
        "checkpoints",
        "config.yaml",
        "data_order.csv",
        "final",
        "metrics.csv",
        "rejects.csv",
        "run.json",
        "status.json",
    ]
    assert [row[0] for row in metrics(folder)] == ["step", "1", "2", "3", "4"]
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == [
        "step-00000002",
        "step-00000004",
    ]
    status = json.loads((folder / "status.json").read_text(encoding="utf-8"))
    assert (status["state"], status["step"]) == ("done", 4)
    facts = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    assert (facts["processes"], facts["strategy"], facts["threads"]) == (1, "none", 1)
    assert facts["packages"]["torch"]
    assert facts["config_hash"]
    assert not leftovers(folder)
    assert all(path.stat().st_size for path in (folder / "checkpoints").rglob("*") if path.is_file())


def test_the_final_weights_are_a_model_and_weights_to_start_from(finished: Path, tmp_path: Path) -> None:
    final = finished / "runs" / "run" / "final" / "model.safetensors"
    loaded = load_model(final)
    assert loaded.architecture.name == "xut"
    with safe_open(final, framework="pt") as file:
        metadata = file.metadata()
    assert metadata["flowcore.arch"] == "xut"
    assert json.loads(metadata["flowcore.config"])["dim"] == 64
    assert {"modelspec.sai_model_spec", "modelspec.architecture", "modelspec.title", "modelspec.date"} <= set(
        metadata
    )
    path = write_config(tmp_path, model={"weights": str(final)}, optimizer={"lr": 1e-30}, train={"steps": 1})
    assert run(path) == 0
    again = weights(tmp_path / "runs" / "run" / "final" / "model.safetensors")
    assert all(torch.equal(again[key], value) for key, value in weights(final).items())


def test_the_data_order_names_each_sample_equally_often(finished: Path) -> None:
    lines = (finished / "runs" / "run" / "data_order.csv").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "step,bucket,keys"
    assert [line.split(",")[0] for line in lines[1:]] == ["1", "2", "3", "4"]
    assert {line.split(",")[1] for line in lines[1:]} <= {"64x64", "80x48", "48x80"}
    assert all(len(line.split(",")[2].split(";")) == 4 for line in lines[1:])


def test_a_finished_run_is_left_as_it_is(finished: Path, tmp_path: Path) -> None:
    path = copied(finished, tmp_path)
    before = tree(tmp_path)
    assert run(path) == 0
    assert tree(tmp_path) == before


def test_a_finished_run_whose_weights_were_removed_writes_them_again(finished: Path, tmp_path: Path) -> None:
    path = copied(finished, tmp_path)
    (tmp_path / "runs" / "run" / "final" / "ema.safetensors").unlink()
    assert run(path) == 0
    assert_equal_runs(tmp_path / "runs" / "run", finished / "runs" / "run")


def test_more_steps_continue_a_finished_run_exactly(finished: Path, tmp_path: Path) -> None:
    path = copied(finished, tmp_path)
    fixed = settings("schedule.name=constant", "train.steps=6", "output.name=x")
    assert run(path, *fixed) == 0
    assert run(path, *settings("schedule.name=constant", "train.steps=3", "output.name=y")) == 0
    assert run(path, *settings("schedule.name=constant", "train.steps=6", "output.name=y")) == 0
    assert_equal_runs(tmp_path / "runs" / "y", tmp_path / "runs" / "x")


@pytest.mark.parametrize(
    ("assignment", "key"),
    [
        ("train.steps=3", "train.steps must stay 4"),
        ("optimizer.lr=0.5", "optimizer.lr must stay 0.0001"),
        ("seed=1", "seed must stay 0"),
        ("train.batch_size=8", "train.batch_size must stay 4"),
        ("model.overrides.depth=1", "model.overrides.depth must stay None"),
        ("optimizer.groups=[{pattern: bias}]", "optimizer.groups.0."),
        ("output.dtype=float16", "output.dtype must stay 'float32'"),
        ("ema.decay=null", "ema.decay must stay 0.9"),
    ],
)
def test_a_changed_key_is_refused_by_name(
    finished: Path, tmp_path: Path, assignment: str, key: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = copied(finished, tmp_path)
    before = tree(tmp_path)
    assert run(path, *settings(assignment)) == 2
    line = error_line(capsys)
    assert line.startswith(f"error: {key}")
    assert "choose another output.name" in line
    assert tree(tmp_path) == before


def test_what_may_change_between_starts(finished: Path, tmp_path: Path) -> None:
    path = copied(finished, tmp_path)
    (tmp_path / "runs" / "run").rename(tmp_path / "runs" / "moved")
    changes = settings(
        "output.name=moved", "checkpoint.keep=1", "sampling.seed=5", "logging.every_steps=3", "train.steps=5"
    )
    assert run(path, *changes) == 0


def test_a_key_that_an_older_configuration_lacks_had_its_default(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = copied(finished, tmp_path)
    stored = tmp_path / "runs" / "run" / "config.yaml"
    table = yaml.safe_load(stored.read_text(encoding="utf-8"))
    del table["train"]["timesteps"], table["cache"], table["optimizer"]["rule"]
    stored.write_text(yaml.safe_dump(table), encoding="utf-8")
    assert run(path) == 0
    assert run(path, *settings("optimizer.rule=fan_in")) == 2
    assert error_line(capsys).startswith("error: optimizer.rule must stay 'constant'")


def test_a_key_that_is_known_no_longer_is_named(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = copied(finished, tmp_path)
    with (tmp_path / "runs" / "run" / "config.yaml").open("a", encoding="utf-8") as file:
        file.write("lora: {rank: 4}\n")
    assert run(path) == 2
    assert error_line(capsys).startswith("error: lora.rank must stay 4")


@pytest.mark.parametrize("content", [b"train: [", b"\xff\xfe\x00"])
def test_a_damaged_stored_configuration_is_named(
    finished: Path, tmp_path: Path, content: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    path = copied(finished, tmp_path)
    (tmp_path / "runs" / "run" / "config.yaml").write_bytes(content)
    assert run(path) == 2
    assert "config.yaml must be the run's configuration" in error_line(capsys)


@pytest.mark.parametrize("part", ["weights.safetensors", "optimizer.safetensors", "manifest.json"])
def test_a_damaged_newest_checkpoint_gives_one_warning_and_the_same_weights(
    finished: Path, tmp_path: Path, part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = copied(finished, tmp_path)
    spoilt = tmp_path / "runs" / "run" / "checkpoints" / "step-00000004"
    (spoilt / part).write_bytes((spoilt / part).read_bytes()[:-7])
    (tmp_path / "runs" / "run" / "final" / "model.safetensors").unlink()
    capsys.readouterr()
    assert run(path) == 0
    warned = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning:")]
    assert len(warned) == 1
    assert str(spoilt) in warned[0]
    assert_equal_runs(tmp_path / "runs" / "run", finished / "runs" / "run")


def test_only_damaged_checkpoints_are_an_error(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = copied(finished, tmp_path)
    for spoilt in (tmp_path / "runs" / "run" / "checkpoints").iterdir():
        (spoilt / "ema.safetensors").write_bytes(b"")
    before = tree(tmp_path)
    assert run(path) == 2
    assert "every checkpoint is damaged (step-00000004, step-00000002)" in error_line(capsys)
    assert tree(tmp_path) == before


def test_resume_from_a_named_checkpoint(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = copied(finished, tmp_path)
    checkpoints = tmp_path / "runs" / "run" / "checkpoints"
    assert run(path, "--resume", str(checkpoints / "step-00000002")) == 0
    assert_equal_runs(tmp_path / "runs" / "run", finished / "runs" / "run")
    (checkpoints / "step-00000002" / "weights.safetensors").write_bytes(b"x")
    capsys.readouterr()
    assert run(path, "--resume", str(checkpoints / "step-00000002")) == 2
    assert "step-00000002: weights.safetensors does not match its checksum" in error_line(capsys)
    assert run(path, "--resume", "lastest") == 2
    assert "--resume must be latest, none or a checkpoint folder, got 'lastest'" in error_line(capsys)
    assert run(path, "--resume", "none") == 2
    assert "--resume none needs a run without checkpoints" in error_line(capsys)


def test_a_cached_run_equals_an_uncached_one(finished: Path, tmp_path: Path) -> None:
    path = copied(finished, tmp_path)
    shutil.rmtree(tmp_path / "runs")
    for name in ("first", "second"):
        assert run(path, *settings(f"output.name={name}", f"cache.dir={tmp_path / 'cache'}")) == 0
        assert_equal_runs(tmp_path / "runs" / name, finished / "runs" / "run")
    assert not leftovers(tmp_path / "cache")


def test_micro_batches_follow_the_whole_batch(finished: Path, tmp_path: Path) -> None:
    path = copied(finished, tmp_path)
    assert run(path, *settings("output.name=micro", "train.micro_batch_size=1")) == 0
    found, wanted = metrics(tmp_path / "runs" / "micro"), metrics(finished / "runs" / "run")
    for row, other in zip(found[1:], wanted[1:], strict=True):
        assert float(row[1]) == pytest.approx(float(other[1]), rel=1e-5)


def test_samples_and_plot(tmp_path: Path) -> None:
    path = write_config(
        tmp_path,
        train={"steps": 2},
        sampling={"every_steps": 1, "steps": 1, "prompts": ["a", "b", "c"], "size": [48, 32]},
        logging={"plots": True},
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of matplotlib, while it is imported
        assert run(path) == 0
    folder = tmp_path / "runs" / "run"
    assert [p.name for p in sorted((folder / "samples").iterdir())] == [
        "step-00000001.png",
        "step-00000002.png",
    ]
    assert (folder / "plots" / "loss.png").exists()
    with Image.open(folder / "samples" / "step-00000002.png") as image:
        assert image.size == (2 * 50, 2 * 34)


def test_sampling_does_not_change_the_training(finished: Path, tmp_path: Path) -> None:
    path = copied(finished, tmp_path)
    assert run(path, *settings("output.name=x", "sampling.every_steps=1", "sampling.steps=1")) == 0
    assert_equal_runs(tmp_path / "runs" / "x", finished / "runs" / "run")
