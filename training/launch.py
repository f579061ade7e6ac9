"""Starts or continues a run in its folder."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import yaml

from flowcore.errors import CheckpointError, ConfigError
from training.config import LoopConfig
from training.files import remove_leftovers, write_atomic, write_failure
from training.log import write_status
from training.loop import Objective, Run, train
from training.state import Checkpoint, newest_checkpoint, read_checkpoint
from training.stop import StopFlag

Builder = Callable[[torch.device, StopFlag], Objective]
Finisher = Callable[[Run, Path], None]

_FREE = ("checkpoint", "sampling", "logging")


def pick_device() -> torch.device:
    """CUDA, else MPS, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def launch(config: LoopConfig, build: Builder, finish: Finisher, stop: StopFlag, resume: str = "latest") -> bool:
    """Runs `config` in its folder from the checkpoint that `resume` names (latest, none, or a folder).

    Returns False if a stop was asked for before the last step. `finish` writes the final weights.
    Raises: ConfigError, CheckpointError before anything is written; RunError if the run fails.
    """
    folder = config.folder
    with run_lock(folder):
        refuse_changes(folder, config)
        checkpoint = _find(folder, resume)
        device = pick_device()
        run = Run(config, build(device, stop), device)
        if checkpoint:
            run.restore(checkpoint)
        elif resume == "none" and (folder / "checkpoints").exists():
            raise ConfigError(f"{folder}: holds checkpoints; choose another output.name or --resume latest")
        if run.step >= config.train.steps and _is_done(folder):
            return True
        try:
            _open_folder(folder, config, device)
            done = train(run, folder, stop)
            if done:
                finish(run, folder)
        except BaseException as err:
            with contextlib.suppress(OSError):
                write_status(folder, "failed", run.step)
            if isinstance(err, OSError):
                raise write_failure(err, folder) from err
            raise
        return done


def refuse_changes(folder: Path, config: LoopConfig) -> None:
    """Raises: ConfigError naming the key if a started run's configuration was changed where it must not be."""
    path = folder / "config.yaml"
    if not path.exists():
        return
    before = _flat(yaml.safe_load(path.read_text(encoding="utf-8")) or {})
    now = _flat(config.model_dump(mode="json"))
    for name in sorted(set(before) | set(now)):
        old, new = before.get(name), now.get(name)
        if old == new or name.split(".")[0] in _FREE or name.startswith("output."):
            continue
        if name == "train.steps" and (new or 0) >= (old or 0):
            continue
        raise ConfigError(
            f"{name} must stay {old!r} to continue the run in {folder}, got {new!r}; choose another output.name"
        )


@contextlib.contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Holds the run folder for this process; a second start waits up to 60 s for the first to end.

    Raises: ConfigError if the folder stays in use.
    """
    name = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:24]
    path = Path(tempfile.gettempdir()) / f"flowcore-run-{name}.lock"
    with path.open("a+", encoding="utf-8") as file:
        deadline = time.monotonic() + 60
        while not _try_lock(file.fileno()):
            if time.monotonic() > deadline:
                raise ConfigError(f"{folder}: another process trains in this folder; wait for it or stop it")
            time.sleep(0.5)
        yield


def _try_lock(handle: int) -> bool:
    """Takes an exclusive lock that ends with the process."""
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _find(folder: Path, resume: str) -> Checkpoint | None:
    if resume == "none":
        return None
    if resume != "latest":
        return read_checkpoint(Path(resume))
    warnings: list[str] = []
    try:
        return newest_checkpoint(folder / "checkpoints", warnings)
    except CheckpointError:
        raise
    finally:
        for line in warnings:
            sys.stderr.write(line + "\n")


def _is_done(folder: Path) -> bool:
    status = folder / "status.json"
    return status.exists() and json.loads(status.read_text(encoding="utf-8"))["state"] == "done" and (
        folder / "final"
    ).exists()


def _open_folder(folder: Path, config: LoopConfig, device: torch.device) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)
    write_atomic(folder / "config.yaml", yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
    facts: dict[str, Any] = {
        "processes": 1,
        "strategy": "none",
        "device": str(device),
        "threads": torch.get_num_threads(),
        "pid": os.getpid(),
        "host": platform.node(),
        "python": platform.python_version(),
        "packages": {name: metadata.version(name) for name in ("torch", "transformers", "diffusers", "safetensors")},
    }
    write_atomic(folder / "run.json", json.dumps(facts, indent=1) + "\n")


def _flat(table: Any, prefix: str = "") -> dict[str, Any]:
    """Leaves of nested tables and lists by dotted path."""
    if isinstance(table, dict):
        items = table.items()
    elif isinstance(table, list):
        items = ((str(i), v) for i, v in enumerate(table))  # type: ignore[assignment]
    else:
        return {prefix[:-1]: table}
    return {k: v for name, value in items for k, v in _flat(value, f"{prefix}{name}.").items()}
