"""Trains a model from a configuration: `python -m training.run CONFIG`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from flowcore.errors import ConfigError
from training.cli import DONE, STOPPED, parser, run_command
from training.processes import run_processes
from training.stop import StopFlag
from training.team import Team, join, launched_rank, launched_size, silent

if TYPE_CHECKING:
    import torch

    from training.assemble import Prepared
    from training.loop import Run
    from training.objectives.flow_matching import FlowMatchingObjective
    from training.strategies import Strategy


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code: 0 done, 1 failed, 2 unusable input, 3 stopped after saving."""
    made = parser("run", "Train a model on image folders. The same command again continues the run.")
    made.add_argument("config", type=Path, help="YAML or TOML file")
    made.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY.PATH=VALUE",
        help="override a key (YAML scalar or list)",
    )
    made.add_argument(
        "--processes", type=int, metavar="N", help="train with N processes of this machine (see distributed)"
    )
    made.add_argument("--resume", default="latest", help="latest (default), none, or a checkpoint folder")
    made.add_argument(
        "--dry-run", action="store_true", help="check everything, print the plan, write nothing"
    )
    made.add_argument("--json", action="store_true", help="with --dry-run: print the plan as one JSON object")
    stop = StopFlag()
    stop.listen()
    given = list(sys.argv[1:] if arguments is None else arguments)
    with silent(is_silent=launched_rank() > 0):
        parsed = made.parse_args(given)
    return run_command(lambda a: _run(a, given, stop), parsed)


def _run(arguments: argparse.Namespace, given: Sequence[str], stop: StopFlag) -> int:
    if arguments.json and not arguments.dry_run:
        raise ConfigError("--json must come with --dry-run, got it alone; add --dry-run")
    processes = arguments.processes
    if processes is not None and processes < 1:
        raise ConfigError(f"--processes must be 1 or more, got {processes}")
    if arguments.dry_run:
        return _plan(arguments, stop)
    if launched_size() == 1 and (processes or 1) > 1:
        return run_processes(processes, given, stop)
    team = join(processes)
    with team.connected():
        return _train(arguments, team, stop)


def _plan(arguments: argparse.Namespace, stop: StopFlag) -> int:
    """Prints the plan."""
    # Imported here, for these load pydantic and torch: a signal before that would end the process.
    from training.config import RunConfig, load_config

    config = load_config(RunConfig, arguments.config, arguments.set)
    from training.assemble import prepare
    from training.plan import describe, make_plan
    from training.strategies import check_processes

    processes = arguments.processes or launched_size()
    check_processes(config, processes)
    plan = make_plan(prepare(config, stop), processes)
    sys.stdout.write((json.dumps(plan) if arguments.json else describe(plan, processes)) + "\n")
    return DONE


def _train(arguments: argparse.Namespace, team: Team, stop: StopFlag) -> int:
    """Trains as one of the team."""
    from training.config import RunConfig, load_config

    config = team.lead(lambda: load_config(RunConfig, arguments.config, arguments.set))
    from training.assemble import prepare
    from training.strategies import check_package, check_processes, strategy_of

    team.lead(lambda: check_processes(config, team.size))
    team.lead(lambda: check_package(config))
    prepared = team.each(lambda: prepare(config, stop))
    is_done = start(prepared, stop, arguments.resume, strategy_of(prepared.config, team))
    team.leave()
    if is_done:
        return DONE
    sys.stderr.write(f"stopped; the same command continues the run in {config.folder}\n")
    return STOPPED


def start(prepared: Prepared, stop: StopFlag, resume: str, strategy: Strategy | None = None) -> bool:
    """Trains to the last step; False if a stop came first."""
    from training.assemble import build_objective, result_names, write_final, write_first_batch, write_rejects
    from training.launch import launch

    def build(device: torch.device, stop: StopFlag) -> FlowMatchingObjective:
        return build_objective(prepared, device, stop)

    def begin(run: Run, folder: Path) -> None:
        write_rejects(run, folder, prepared)
        write_first_batch(run, folder)

    results = result_names(prepared.config)
    return launch(
        prepared.config, build, write_final, stop, resume, begin=begin, results=results, strategy=strategy
    )


if __name__ == "__main__":
    sys.exit(main())
