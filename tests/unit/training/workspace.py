"""Small image folders, configurations of the tiny preset, and runs in this process or in one of its own."""

import csv
import multiprocessing
import os
import shutil
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from training.config import RunConfig, validate
from training.objectives.flow_matching import FlowMatchingObjective
from training.run import main

SIZES = ((32, 32), (48, 32), (32, 48))
PRELOADED = ["torch", "training.assemble", "training.launch", "training.run"]


def write_images(folder: Path, count: int = 8, sizes: Sequence[tuple[int, int]] = SIZES[:1]) -> Path:
    """Noise pictures 00.png, 01.png, ... with captions beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        width, height = sizes[number % len(sizes)]
        pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:02d}.png")
        (folder / f"{number:02d}.txt").write_text(f"picture {number}", encoding="utf-8")
    return folder


def write_edits(folder: Path) -> Path:
    """Eight pictures of 64 pixels; three of the captions ask for changes of source pictures beside them."""
    write_images(folder, 11, [(64, 64)])
    for number in (0, 2, 4):
        (folder / f"{number:02d}.png").rename(folder / f"{number + 1:02d}.source.png")
        (folder / f"{number:02d}.txt").unlink()
    return folder


def run_table(folder: Path, **sections: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration of the tiny preset on `folder/images`; sections are merged into it."""
    table: dict[str, Any] = {
        "output": {"dir": str(folder / "runs")},
        "model": {"arch": "xut"},
        "datasets": [{"path": str(folder / "images")}],
        "buckets": {"resolution": 32},
        "train": {"steps": 4, "batch_size": 4},
        "ema": {"decay": 0.9},
        "checkpoint": {"every_steps": 2},
        "logging": {"every_steps": 1, "tensorboard": False, "plots": False},
    }
    for name, values in sections.items():
        before = table.get(name, {})
        is_merged = isinstance(values, Mapping) and isinstance(before, Mapping)
        table[name] = {**before, **values} if is_merged else values
    return table


def run_config(folder: Path, **sections: Mapping[str, Any]) -> RunConfig:
    """The same as a validated configuration."""
    return validate(RunConfig, run_table(folder, **sections), "test")


def write_config(folder: Path, **sections: Mapping[str, Any]) -> Path:
    """The same as a file `folder/run.yaml`; pictures are drawn unless they are there."""
    if not (folder / "images").exists():
        write_images(folder / "images")
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(run_table(folder, **sections)), encoding="utf-8")
    return path


def run(path: Path, *arguments: str) -> int:
    """Exit code of `training.run`, in this process."""
    return main([str(path), *arguments])


def settings(*assignments: str) -> list[str]:
    """`--set` arguments of key=value texts."""
    return [part for assignment in assignments for part in ("--set", assignment)]


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    """The one error line on stderr, checked for its form."""
    err = capsys.readouterr().err
    lines = [line for line in err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1, err
    assert "Traceback" not in err
    assert len(lines[0]) < 500
    return lines[0]


def fitted(made: FlowMatchingObjective, steps: int, batches: int) -> list[float]:
    """Losses of an objective over a few batches of four, again and again, while its module learns them."""
    optimizer = torch.optim.Adam(made.module.parameters(), lr=3e-3)
    losses = []
    for step in range(steps):
        loss = made.loss(step % batches, slice(0, 4))
        losses.append(float(loss.detach()))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return losses


def metrics(folder: Path) -> list[list[str]]:
    """Rows of metrics.csv without the seconds, which differ from run to run."""
    with (folder / "metrics.csv").open(encoding="utf-8", newline="") as file:
        return [row[:-1] for row in csv.reader(file)]


def weights(path: Path) -> dict[str, Tensor]:
    """Tensors of a file."""
    return load_file(path)


def assert_equal_runs(actual: Path, expected: Path) -> None:
    """Weights, averages and metrics of two finished runs must be equal bit for bit."""
    assert metrics(actual) == metrics(expected)
    for name in ("final/model.safetensors", "final/ema.safetensors"):
        found, wanted = weights(actual / name), weights(expected / name)
        assert found.keys() == wanted.keys()
        different = [key for key in wanted if not torch.equal(found[key], wanted[key])]
        assert not different, (name, different[:3])


def tree(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of change of every file below a folder, by relative path."""
    return {
        path.relative_to(folder).as_posix(): (path.stat().st_size, path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def leftovers(folder: Path) -> list[str]:
    """Names with `tmp` in them below a folder."""
    return [path.name for path in folder.rglob("*") if "tmp" in path.name]


class RunProcess:
    """`training.run` in a process of its own, forked from a server that has torch loaded already."""

    def __init__(self, path: Path, *arguments: str, environment: Mapping[str, str] | None = None) -> None:
        """Starts the run; its output goes to a file beside the configuration."""
        self.log = path.with_suffix(".log")
        context: Any = multiprocessing.get_context("spawn" if sys.platform == "win32" else "forkserver")
        if sys.platform != "win32":
            context.set_forkserver_preload(PRELOADED)
        self.process = context.Process(
            target=_run_process, args=(str(self.log), [str(path), *arguments], dict(environment or {}))
        )
        self.process.start()

    def wait_for(self, condition: Callable[[], bool], seconds: float = 120) -> None:
        """Returns once the condition holds; fails if the run ends before, or takes too long."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.process.is_alive(), self.log.read_text(encoding="utf-8")
            assert time.monotonic() < deadline, "the run takes too long"
            time.sleep(0.002)

    def signal(self, number: int) -> None:
        """Sends a signal."""
        os.kill(self.process.pid, number)

    def wait(self, seconds: float = 120) -> int:
        """Exit code; negative for a signal that ended it."""
        self.process.join(seconds)
        assert self.process.exitcode is not None, "the run does not end"
        code: int = self.process.exitcode
        return code


class RunProcesses:
    """Processes of one run, as a launcher would start them."""

    def __init__(self, path: Path, *arguments: str, size: int = 2) -> None:
        """Starts all; they write to one log."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(size)}
        self.processes = [
            RunProcess(
                path,
                *arguments,
                environment={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
            )
            for rank in range(size)
        ]

    def wait(self) -> list[int]:
        """The exit codes."""
        return [process.wait() for process in self.processes]


def _run_process(log: str, arguments: list[str], environment: dict[str, str]) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    with open(log, "a", encoding="utf-8") as file, redirect_stderr(file), redirect_stdout(file):  # noqa: PTH123
        code = main(arguments)
    sys.exit(code)


def steps_logged(folder: Path) -> int:
    """Rows of metrics.csv so far."""
    path = folder / "metrics.csv"
    return max(0, len(path.read_text(encoding="utf-8").splitlines()) - 1) if path.exists() else 0


def copied(finished: Path, folder: Path) -> Path:
    """A copy of a finished run as the run of `folder/run.yaml`, which reads the same pictures."""
    shutil.copytree(finished / "runs", folder / "runs")
    text = (finished / "run.yaml").read_text(encoding="utf-8")
    table = yaml.safe_load(text)
    table["output"]["dir"] = str(folder / "runs")
    (folder / "run.yaml").write_text(yaml.safe_dump(table), encoding="utf-8")
    return folder / "run.yaml"
