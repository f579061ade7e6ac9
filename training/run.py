"""Trains a model from a configuration: `python -m training.run CONFIG`."""

from __future__ import annotations

import argparse
import csv
import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from training.cli import DONE, STOPPED, parser, run_command
from training.config import RunConfig, load_config
from training.files import write_atomic
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
        "--set", action="append", default=[], metavar="KEY.PATH=VALUE", help="override a key (YAML scalar or list)"
    )
    made.add_argument("--resume", default="latest", help="latest (default), none, or a checkpoint folder")
    made.add_argument("--dry-run", action="store_true", help="check everything, print the plan, write nothing")
    made.add_argument("--json", action="store_true", help="with --dry-run: print the plan as one JSON object")
    stop = StopFlag()
    stop.listen()
    return run_command(lambda a: _run(a, stop), made.parse_args(arguments))


def _run(arguments: argparse.Namespace, stop: StopFlag) -> int:
    config = load_config(RunConfig, arguments.config, arguments.set)
    from training.assemble import prepare

    prepared = prepare(config)
    if arguments.dry_run:
        from training.plan import describe, make_plan

        plan = make_plan(prepared)
        sys.stdout.write((json.dumps(plan) if arguments.json else describe(plan)) + "\n")
        return DONE
    return DONE if start(prepared, stop, arguments.resume) else STOPPED


def start(prepared: Prepared, stop: StopFlag, resume: str) -> bool:
    """Trains to the last step; False if a stop came first."""
    from training.assemble import build_objective, write_final
    from training.launch import launch

    def build(device: torch.device, stop: StopFlag) -> FlowMatchingObjective:
        return build_objective(prepared, device, stop)

    def finish(run: Run, folder: Path) -> None:
        write_final(run, folder, prepared)
        write_rejects(prepared, folder)

    return launch(prepared.config, build, finish, stop, resume)


def write_rejects(prepared: Prepared, folder: Path) -> None:
    """Lists what was left out, with reasons, in rejects.csv."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["file", "reason"])
    writer.writerows([str(reject.path), reject.reason] for reject in prepared.rejects)
    write_atomic(folder / "rejects.csv", text.getvalue())


if __name__ == "__main__":
    sys.exit(main())
