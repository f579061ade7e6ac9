"""Several processes: the curve of one, the same files, stops and kills, and what is refused."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support import ROOT
from tests.unit.training.workspace import (
    RunProcesses,
    assert_equal_runs,
    error_line,
    leftovers,
    metrics,
    run,
    settings,
    steps_logged,
    weights,
    write_config,
    write_edits,
)

LIKE = 1e-6
"""Relative: sums in another order change the last bits, which do not grow further in a few steps."""


def xut(folder: Path) -> Path:
    return write_config(
        folder,
        train={"steps": 4, "micro_batch_size": 1},
        sampling={"every_steps": 2, "steps": 1},
        optimizer={"lr": 1e-3},
        schedule={"name": "constant", "steps": 4},
        logging={"data_order": True},
    )


def exo(folder: Path) -> Path:
    """Stages, checkpointing, iterations, edits, and parameters that stay as they are."""
    write_edits(folder / "images")
    stages = [
        {"steps": 1, "train": {"trainable": [r"^projector\."], "exo": {"task": "projector"}}},
        {"steps": 3, "train": {"trainable": [r"^(diffusion_head|edit_head|tokens|adapters|trunk)\."]}},
    ]
    path = write_config(
        folder,
        model={"arch": "exo"},
        buckets={"resolution": 64},
        train={"stages": stages, "gradient_checkpointing": True, "exo": {"iterations": [2, 3]}},
        optimizer={"lr": 1e-3},
    )
    path.write_text(path.read_text(encoding="utf-8").replace("  steps: 4\n", "", 1), encoding="utf-8")
    return path


CONFIGS = {"xut": xut, "exo": exo}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Configurations whose run `one` was made by one process."""
    paths = {}
    for name, config in CONFIGS.items():
        paths[name] = config(tmp_path_factory.mktemp(name))
        assert run(paths[name], *settings("output.name=one")) == 0
    return paths


def folder_of(path: Path, name: str) -> Path:
    return path.parent / "runs" / name


def curve(path: Path, name: str) -> list[list[float]]:
    return [[float(value) for value in row] for row in metrics(folder_of(path, name))[1:]]


def assert_same_curve(path: Path, name: str) -> None:
    """Loss of every step, and the learning rates; the data in the same order."""
    found, wanted = curve(path, name), curve(path, "one")
    assert len(found) == len(wanted) == 4
    for row, like in zip(found, wanted, strict=True):
        assert row[:3] == pytest.approx(like[:3], rel=LIKE)
        assert row[3] == pytest.approx(like[3], rel=1e-4)
    order = [folder_of(path, run_name) / "data_order.csv" for run_name in (name, "one")]
    if order[1].exists():
        assert order[0].read_bytes() == order[1].read_bytes()


def facts(path: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder_of(path, name) / "run.json").read_text(encoding="utf-8"))
    return found


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
@pytest.mark.parametrize("name", CONFIGS)
def test_two_processes_have_the_curve_of_one(alone: dict[str, Path], name: str, strategy: str) -> None:
    path = alone[name]
    chosen = settings(f"output.name={strategy}", f"distributed.strategy={strategy}")
    assert RunProcesses(path, *chosen).wait() == [0, 0]
    assert_same_curve(path, strategy)
    assert (facts(path, strategy)["processes"], facts(path, strategy)["strategy"]) == (2, strategy)
    assert_near(path, strategy)
    names = [sorted(p.name for p in (folder_of(path, n) / "samples").glob("*")) for n in (strategy, "one")]
    assert names[0] == names[1]


def assert_near(path: Path, name: str) -> None:
    """Final weights and averages but for what AdamW makes of the last bits of gradients near 0."""
    for file in ("model", "ema"):
        found, wanted = (weights(folder_of(path, n) / "final" / f"{file}.safetensors") for n in (name, "one"))
        assert found.keys() == wanted.keys()
        for key, tensor in found.items():
            assert (tensor - wanted[key]).abs().max() <= 1e-4, key


@pytest.mark.parametrize("strategy", ["none", "fsdp2"])
def test_a_run_of_two_processes_goes_on_with_one(alone: dict[str, Path], strategy: str) -> None:
    path = alone["xut"]
    chosen = settings(f"output.name=fewer-{strategy}", f"distributed.strategy={strategy}")
    assert RunProcesses(path, *chosen, *settings("train.steps=2")).wait() == [0, 0]
    assert RunProcesses(path, *chosen, size=1).wait() == [0]
    assert_same_curve(path, f"fewer-{strategy}")
    assert facts(path, f"fewer-{strategy}")["strategy"] == strategy
    log = path.with_suffix(".log").read_text(encoding="utf-8")
    assert "the run had 2 processes, now 1: it continues, but not bit for bit" in log


DIVIDED_ALONE: dict[str, dict[str, Any]] = {
    "flux": {"optimizer": {"name": "sgd", "lr": 0.01}},
    "single_stream": {"precision": "bfloat16"},
}


@pytest.mark.parametrize("arch", DIVIDED_ALONE)
def test_a_divided_model_computes_as_a_whole_one(tmp_path: Path, arch: str) -> None:
    """With one process every bit is that of a model that is not divided, wherever it waits."""
    path = write_config(tmp_path, model={"arch": arch}, **DIVIDED_ALONE[arch])
    assert run(path, *settings("output.name=whole")) == 0
    divided = settings("distributed={strategy: fsdp2, cpu_offload: true}")
    assert RunProcesses(path, *divided, size=1).wait() == [0]
    assert_equal_runs(folder_of(path, "run"), folder_of(path, "whole"))


def test_muon_orthogonalises_divided_matrices(tmp_path: Path) -> None:
    """But for its products in bfloat16, which differ by their order."""
    groups = [{"pattern": r"mlp\.w3\.weight", "name": "muon", "lr": 0.01}]
    path = write_config(tmp_path, optimizer={"groups": groups})
    assert run(path, *settings("output.name=one")) == 0
    assert RunProcesses(path, *settings("distributed.strategy=fsdp2")).wait() == [0, 0]
    for row, like in zip(curve(path, "run"), curve(path, "one"), strict=True):
        assert row == pytest.approx(like, rel=2e-4)


def test_what_cannot_be_divided_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_config(tmp_path, model={"arch": "tinyflux"}, distributed={"strategy": "fsdp2"})
    assert RunProcesses(path).wait() == [2, 2]
    line = "distributed.strategy must be none or ddp for this model, whose text_balance is a single number"
    assert error_of(path) == f"error: {line}, got fsdp2"
    assert run(path, *settings("distributed={strategy: ddp, cpu_offload: true}")) == 2
    assert "cpu_offload must be false with strategy ddp, got true; use fsdp2" in error_line(capsys)
    assert not (tmp_path / "runs").exists()


ZERO_FAULTS = [
    (["optimizer.name=muon"], "optimizer.name must be adamw or sgd, one for all groups"),
    (
        ["optimizer.groups=[{pattern: bias, name: sgd}]"],
        "got adamw and sgd; adamw, muon and sgd work with none",
    ),
    (
        ["train.stages=[{steps: 1}]", "train.steps=1"],
        "train.stages must be left out with distributed.strategy zero3",
    ),
    (["precision=float16"], "precision must be float32 or bfloat16 with distributed.strategy zero3"),
    ([], "distributed.strategy must be none, ddp or fsdp2 without the package deepspeed, got zero3"),
]


@pytest.mark.parametrize(("assignments", "expected"), ZERO_FAULTS)
def test_what_deepspeed_does_not_take_is_refused(
    tmp_path: Path,
    assignments: list[str],
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "deepspeed" else found(name)
    )
    path = write_config(tmp_path)
    assert run(path, *settings("distributed.strategy=zero3", *assignments)) == 2
    assert expected in error_line(capsys)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("strategy", ["zero2", "zero3"])
def test_zero_has_the_curve_of_one_and_goes_on_with_one(alone: dict[str, Path], strategy: str) -> None:
    pytest.importorskip("deepspeed")
    path = alone["xut"]
    chosen = settings(f"output.name={strategy}", f"distributed.strategy={strategy}")
    assert RunProcesses(path, *chosen, *settings("train.steps=2")).wait() == [0, 0]
    assert RunProcesses(path, *chosen, *settings("train.steps=3")).wait() == [0, 0]
    assert RunProcesses(path, *chosen, size=1).wait() == [0]
    assert_same_curve(path, strategy)
    assert_near(path, strategy)


def started(path: Path, name: str) -> subprocess.Popen[bytes]:
    """`training.run --processes 2` as a user starts it, in a group of its own."""
    command = [sys.executable, "-m", "training.run", str(path), "--processes", "2"]
    with path.with_suffix(".log").open("ab") as log:
        return subprocess.Popen(
            [*command, *settings(f"output.name={name}")],
            stdout=log,
            stderr=log,
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )


def wait_for(process: subprocess.Popen[bytes], condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, "the run ended too early"
        assert time.monotonic() < deadline, "the run takes too long"
        time.sleep(0.02)


@pytest.mark.skipif(os.name == "nt", reason="signals of other systems")
def test_processes_end_with_their_starter_and_stop_with_it(tmp_path: Path) -> None:
    path = xut(tmp_path)
    path.write_text(path.read_text(encoding="utf-8").replace("steps: 4", "steps: 20"), encoding="utf-8")
    assert RunProcesses(path, *settings("output.name=whole")).wait() == [0, 0]
    folder = folder_of(path, "run")

    starter = started(path, "run")
    wait_for(starter, lambda: steps_logged(folder) >= 4)
    children = psutil.Process(starter.pid).children(recursive=True)
    assert len(children) == 2
    assert {os.getpgid(child.pid) for child in children} == {starter.pid}
    starter.kill()
    starter.wait()
    assert not psutil.wait_procs(children, timeout=20)[1]

    starter = started(path, "run")
    wait_for(starter, lambda: steps_logged(folder) >= 8)
    starter.send_signal(signal.SIGTERM)
    assert starter.wait(60) == 3
    last = int(metrics(folder)[-1][0])
    assert last < 20
    assert (folder / "checkpoints" / f"step-{last:08d}").is_dir()
    assert RunProcesses(path, *settings("output.name=run")).wait() == [0, 0]
    assert_equal_runs(folder, folder_of(path, "whole"))
    assert not leftovers(folder)
    assert "error:" not in path.with_suffix(".log").read_text(encoding="utf-8")


def error_of(path: Path) -> str:
    """The one error line that the processes of a run wrote together."""
    log = path.with_suffix(".log").read_text(encoding="utf-8")
    lines = [line for line in log.splitlines() if line.startswith("error:")]
    assert len(lines) == 1, log
    assert "Traceback" not in log
    return lines[0]


def test_a_batch_that_cannot_be_divided_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_config(tmp_path)
    assert RunProcesses(path, *settings("train.micro_batch_size=4")).wait() == [2, 2]
    line = "train.micro_batch_size must divide batch_size / processes (4 / 2 = 2), got 4"
    assert error_of(path) == f"error: {line}"
    assert run(path, "--dry-run", "--processes", "3") == 2
    line = "train.batch_size must be a multiple of the 3 processes, got 4; nearest: 3 and 6"
    assert error_line(capsys) == f"error: {line}"
    assert run(path, "--processes", "0") == 2
    assert error_line(capsys) == "error: --processes must be 1 or more, got 0"
    assert not (tmp_path / "runs").exists()


def test_the_launcher_decides_how_many_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run(write_config(tmp_path), "--processes", "3") == 2
    assert "--processes must be the 2 of the launcher, got 3" in error_line(capsys)


def test_a_failure_of_all_is_told_once(tmp_path: Path) -> None:
    path = write_config(tmp_path, optimizer={"lr": 1e30}, train={"grad_clip": 0})
    assert RunProcesses(path).wait() == [1, 1]
    assert "must be finite" in error_of(path)
    status = (folder_of(path, "run") / "status.json").read_text(encoding="utf-8")
    assert json.loads(status)["state"] == "failed"


@pytest.mark.skipif(os.name == "nt", reason="signals of other systems")
def test_a_process_that_has_lost_the_others_ends_without_a_word(tmp_path: Path) -> None:
    path = write_config(tmp_path, train={"steps": 500}, checkpoint={"every_steps": 500})
    pair = RunProcesses(path)
    pair.processes[0].wait_for(lambda: steps_logged(folder_of(path, "run")) >= 2)
    pair.processes[1].signal(signal.SIGKILL)
    assert pair.wait() == [1, -signal.SIGKILL]
    log = path.with_suffix(".log").read_text(encoding="utf-8")
    assert "Traceback" not in log
    assert "error:" not in log
