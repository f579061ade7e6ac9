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
from training.stop import StopFlag

if TYPE_CHECKING:
    import torch

    from training.assemble import Prepared
    from training.loop import Run
    from training.objectives.flow_matching import FlowMatchingObjective


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
    made.add_argument("--resume", default="latest", help="latest (default), none, or a checkpoint folder")
    made.add_argument(
        "--dry-run", action="store_true", help="check everything, print the plan, write nothing"
    )
    made.add_argument("--json", action="store_true", help="with --dry-run: print the plan as one JSON object")
    stop = StopFlag()
    stop.listen()
    return run_command(lambda a: _run(a, stop), made.parse_args(arguments))


def _run(arguments: argparse.Namespace, stop: StopFlag) -> int:
    if arguments.json and not arguments.dry_run:
        raise ConfigError("--json must come with --dry-run, got it alone; add --dry-run")
    # Imported here, for these load pydantic and torch: a signal before that would end the process.
    from training.config import RunConfig, load_config

    config = load_config(RunConfig, arguments.config, arguments.set)
    from training.assemble import prepare

    prepared = prepare(config, stop)
    if arguments.dry_run:
        from training.plan import describe, make_plan

        plan = make_plan(prepared)
        sys.stdout.write((json.dumps(plan) if arguments.json else describe(plan)) + "\n")
        return DONE
    if start(prepared, stop, arguments.resume):
        return DONE
    sys.stderr.write(f"stopped; the same command continues the run in {config.folder}\n")
    return STOPPED


def start(prepared: Prepared, stop: StopFlag, resume: str) -> bool:
    """Trains to the last step; False if a stop came first."""
    from training.assemble import build_objective, result_names, write_final, write_first_batch, write_rejects
    from training.launch import launch

    def build(device: torch.device, stop: StopFlag) -> FlowMatchingObjective:
        return build_objective(prepared, device, stop)

    def begin(run: Run, folder: Path) -> None:
        write_rejects(run, folder, prepared)
        write_first_batch(run, folder)

    results = result_names(prepared.config)
    return launch(prepared.config, build, write_final, stop, resume, begin=begin, results=results)


if __name__ == "__main__":
    sys.exit(main())
