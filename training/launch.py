"""Starts or continues a run in its folder."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import platform
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import yaml
from pydantic import ValidationError

from flowcore.errors import CheckpointError, ConfigError, FlowCoreError
from training.config import LoopConfig
from training.files import RunError, remove_leftovers, write_atomic, write_failure
from training.locks import locked
from training.log import read_status, write_status
from training.loop import Objective, Run, train
from training.state import Checkpoint, newest_checkpoint, read_checkpoint
from training.stop import StopFlag
from training.strategies import Strategy
from training.team import Team

Builder = Callable[[torch.device, StopFlag], Objective]
Finisher = Callable[[Run, Path], None]

PACKAGES = ("torch", "transformers", "diffusers", "safetensors", "numpy", "pillow")
# What may differ from the start of a run when it is continued.
_FREE = ("checkpoint.", "sampling.", "logging.", "output.dir", "output.name")


def pick_device() -> torch.device:
    """CUDA, else MPS, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def launch(
    config: LoopConfig,
    build: Builder,
    finish: Finisher,
    stop: StopFlag,
    resume: str = "latest",
    *,
    begin: Finisher | None = None,
    results: Sequence[str] = (),
    strategy: Strategy | None = None,
) -> bool:
    """Runs `config` in its folder from the checkpoint that `resume` names (latest, none, or a folder).

    Args:
        config: what to run.
        build: makes the objective; nothing is written before it returns.
        finish: writes the final weights.
        stop: asked between steps.
        resume: which checkpoint.
        begin: writes what is known at the start.
        results: files in the run's folder that `finish` writes; a finished run that has them is left alone.
        strategy: of the processes; all of them call this.

    Returns False if a stop was asked for before the last step.
    Raises: ConfigError, CheckpointError before anything is written; RunError if the run fails; StoppedError
        before the first step.
    """
    check_packages(config)
    folder = config.folder
    strategy = strategy or Strategy(Team())
    team = strategy.team
    with contextlib.ExitStack() as held:

        def take() -> Checkpoint | None:
            held.enter_context(locked(folder, "run", stop))
            refuse_changes(folder, config)
            return _find(folder, resume)

        checkpoint = team.lead(take)
        if checkpoint and checkpoint.step >= config.train.steps and _is_done(folder, results):
            return True
        device = team.device or pick_device()
        run = team.each(lambda: _made(config, build(device, stop), device, strategy, checkpoint))
        with _failures_of(run, folder):
            team.lead(lambda: _open_folder(folder, run, begin))
            is_done = train(run, folder, stop)
            if is_done:
                finish(run, folder)
            if team.is_first:
                write_status(folder, "done" if is_done else "stopped", run.step)
        return is_done


def _made(
    config: LoopConfig,
    objective: Objective,
    device: torch.device,
    strategy: Strategy,
    checkpoint: Checkpoint | None,
) -> Run:
    """The run at its first step, or where the checkpoint left it."""
    run = Run(config, objective, device, strategy)
    if checkpoint:
        run.restore(checkpoint)
    return run


def check_packages(config: LoopConfig) -> None:
    """Raises: ConfigError if a package that the run's logging needs is not installed."""
    needed = {"tensorboard": config.logging.tensorboard, "matplotlib": config.logging.plots}
    keys = {"tensorboard": "logging.tensorboard", "matplotlib": "logging.plots"}
    for package, is_needed in needed.items():
        if is_needed and importlib.util.find_spec(package) is None:
            raise ConfigError(
                f"{keys[package]} must be false without the package {package}, got true; "
                f"install flowcore[train] or set {keys[package]} to false"
            )


def refuse_changes(folder: Path, config: LoopConfig) -> None:
    """Compares with the configuration that a run was started with; a key that it lacks had its default.

    Raises: ConfigError naming the key if a started run's configuration was changed where it must not be.
    """
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"output.name: {folder} must be a folder, got a file; choose another name")
    path = folder / "config.yaml"
    if not path.exists():
        return
    before, now = _flat(_started_with(path, config)), _flat(config.model_dump(mode="json"))
    for name in sorted(set(before) | set(now)):
        old, new = before.get(name), now.get(name)
        if old == new or name.startswith(_FREE):
            continue
        is_length = name in ("train.steps", f"train.stages.{len(config.train.stages) - 1}.steps")
        if is_length and isinstance(old, int) and isinstance(new, int) and new >= old:
            continue
        raise ConfigError(
            f"{name} must stay {old!r} to continue the run in {folder}, got {new!r}; "
            "choose another output.name"
        )


def _started_with(path: Path, config: LoopConfig) -> object:
    """The table of a run's config.yaml, with today's defaults for keys that it lacks."""
    try:
        table = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as err:
        raise ConfigError(
            f"{path} must be the run's configuration, got {' '.join(str(err).split())[:120]}; "
            "restore it or choose another output.name"
        ) from err
    try:
        return type(config).model_validate(table).model_dump(mode="json")
    except ValidationError:
        return table


@contextlib.contextmanager
def _failures_of(run: Run, folder: Path) -> Iterator[None]:
    """Notes in status.json that a run failed; what a user can repair becomes a RunError."""
    try:
        yield
    except BaseException as err:
        if run.team.is_first:
            with contextlib.suppress(OSError):
                write_status(folder, "failed", run.step)
        if isinstance(err, OSError):
            raise write_failure(err, folder) from err
        if isinstance(err, FlowCoreError) and not isinstance(err, RunError):
            raise RunError(str(err)) from err
        raise


def _find(folder: Path, resume: str) -> Checkpoint | None:
    """The checkpoint to continue from. Raises: CheckpointError, ConfigError."""
    checkpoints = folder / "checkpoints"
    if resume == "none":
        if any(checkpoints.glob("step-*")):
            raise ConfigError(
                f"--resume none needs a run without checkpoints, got some in {folder}; "
                "choose another output.name"
            )
        return None
    if resume != "latest":
        if not Path(resume).is_dir():
            raise CheckpointError(f"--resume must be latest, none or a checkpoint folder, got {resume!r}")
        return read_checkpoint(Path(resume))
    warnings: list[str] = []
    try:
        return newest_checkpoint(checkpoints, warnings)
    finally:
        sys.stderr.writelines(line + "\n" for line in warnings)


def _is_done(folder: Path, results: Sequence[str]) -> bool:
    return read_status(folder).get("state") == "done" and all((folder / name).exists() for name in results)


def _open_folder(folder: Path, run: Run, begin: Finisher | None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)
    _warn_of_change(folder, "threads", torch.get_num_threads())
    _warn_of_change(folder, "processes", run.team.size)
    table = run.config.model_dump(mode="json")
    write_atomic(folder / "config.yaml", yaml.safe_dump(table, sort_keys=False))
    facts: dict[str, Any] = {
        "processes": run.team.size,
        "strategy": run.strategy.name,
        "device": str(run.device),
        "threads": torch.get_num_threads(),
        "pid": os.getpid(),
        "host": platform.node(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "config_hash": hashlib.sha256(json.dumps(table, sort_keys=True).encode()).hexdigest()[:16],
    }
    write_atomic(folder / "run.json", json.dumps(facts, indent=1) + "\n")
    if begin:
        begin(run, folder)


def _warn_of_change(folder: Path, what: str, now: int) -> None:
    """Another number of threads or processes changes the last bit of sums: the resume is not exact."""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        before = json.loads((folder / "run.json").read_text(encoding="utf-8"))[what]
        if before != now:
            sys.stderr.write(
                f"warning: the run had {before} {what}, now {now}: it continues, but not bit for bit\n"
            )


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _flat(table: object, prefix: str = "") -> dict[str, object]:
    """Leaves of nested tables and lists by dotted path."""
    items: Iterable[tuple[object, object]]
    if isinstance(table, dict):
        items = table.items()
    elif isinstance(table, list):
        items = enumerate(table)
    else:
        return {prefix[:-1]: table}
    return {k: v for name, value in items for k, v in _flat(value, f"{prefix}{name}.").items()}
