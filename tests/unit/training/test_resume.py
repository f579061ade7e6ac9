"""Runs that are killed or stopped at any moment and started again end like one that was left alone."""

import contextlib
import json
import os
import random
import signal
import time
from pathlib import Path

import pytest

from tests.support import ROOT, run_python
from tests.unit.training.workspace import (
    SIZES,
    RunProcess,
    assert_equal_runs,
    leftovers,
    metrics,
    settings,
    steps_logged,
    write_config,
    write_images,
)

pytestmark = pytest.mark.skipif(os.name == "nt", reason="signals of other systems")
STEPS = 12


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Configuration of a run with several buckets, a cache and previews; an uninterrupted run as `whole`."""
    folder = tmp_path_factory.mktemp("resume")
    write_images(folder / "images", 10, SIZES)
    path = write_config(
        folder,
        train={"steps": STEPS, "micro_batch_size": 2},
        buckets={"resolution": 64},
        cache={"dir": str(folder / "cache")},
        checkpoint={"every_steps": 2},
        sampling={"every_steps": 5, "steps": 1},
        logging={"data_order": True},
    )
    assert start(path, "whole").wait() == 0
    return path


def start(path: Path, name: str, *assignments: str) -> RunProcess:
    return RunProcess(path, *settings(f"output.name={name}", *assignments))


def folder_of(path: Path, name: str) -> Path:
    return path.parent / "runs" / name


def assert_like_whole(path: Path, name: str) -> None:
    folder, whole = folder_of(path, name), folder_of(path, "whole")
    assert_equal_runs(folder, whole)
    assert (folder / "data_order.csv").read_bytes() == (whole / "data_order.csv").read_bytes()
    assert json.loads((folder / "status.json").read_text(encoding="utf-8"))["state"] == "done"
    assert not leftovers(folder)
    assert not leftovers(path.parent / "cache")


def test_a_run_killed_again_and_again_ends_like_one_left_alone(workplace: Path) -> None:
    chance = random.Random(int(time.time()) // 60)
    folder = folder_of(workplace, "killed")
    for goal in (0, 1, 3, 6, 8, 11):
        process = start(workplace, "killed", f"cache.dir={workplace.parent / 'killed-cache'}")
        process.wait_for(lambda goal=goal: steps_logged(folder) >= goal)
        time.sleep(chance.random() * 0.2)
        with contextlib.suppress(ProcessLookupError):  # it may have ended meanwhile
            process.signal(signal.SIGKILL)
        assert process.wait() in (-signal.SIGKILL, 0)
    assert start(workplace, "killed", f"cache.dir={workplace.parent / 'killed-cache'}").wait() == 0
    assert_like_whole(workplace, "killed")


@pytest.mark.parametrize("place", ["checkpoint", "final"])
def test_a_run_killed_while_it_saves_leaves_nothing_half(workplace: Path, place: str) -> None:
    name = f"saving-{place}"
    folder = folder_of(workplace, name)
    process = start(workplace, name)
    saving = "checkpoints/.tmp-*/*" if place == "checkpoint" else "final/*"
    process.wait_for(lambda: any(folder.glob(saving)))
    process.signal(signal.SIGKILL)
    process.wait()
    for found in (folder / "checkpoints").glob("step-*"):
        assert (found / "manifest.json").stat().st_size > 0
    assert start(workplace, name).wait() == 0
    assert_like_whole(workplace, name)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_run_saves_and_continues_exactly(workplace: Path, number: signal.Signals) -> None:
    name = number.name
    folder = folder_of(workplace, name)
    process = start(workplace, name, "checkpoint.every_steps=100")
    process.wait_for(lambda: steps_logged(folder) >= 3)
    process.signal(number)
    begun = time.monotonic()
    assert process.wait() == 3
    assert time.monotonic() - begun < 30
    status = json.loads((folder / "status.json").read_text(encoding="utf-8"))
    last = int(metrics(folder)[-1][0])
    assert (status["state"], status["step"]) == ("stopped", last)
    assert [path.name for path in (folder / "checkpoints").iterdir()] == [f"step-{last:08d}"]
    assert not leftovers(folder)
    log = workplace.with_suffix(".log").read_text(encoding="utf-8")
    assert "error:" not in log
    assert f"stopped; the same command continues the run in {folder}" in log
    assert start(workplace, name, "checkpoint.every_steps=100").wait() == 0
    assert_like_whole(workplace, name)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_at_the_very_start_is_heeded(workplace: Path, number: signal.Signals) -> None:
    code = f"""
import os, runpy, sys
import training.stop
listen = training.stop.StopFlag.listen
def listen_and_send(flag):
    listen(flag)
    assert "torch" not in sys.modules and "pydantic" not in sys.modules
    os.kill(os.getpid(), {int(number)})
training.stop.StopFlag.listen = listen_and_send
sys.argv = ["run", {str(workplace)!r}, "--set", "output.name=early"]
runpy.run_module("training.run", run_name="__main__")
"""
    result = run_python("-c", code, OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT))
    assert result.returncode == 3, result.stderr
    assert "Traceback" not in result.stderr
    assert not folder_of(workplace, "early").exists()
