"""Trains on pairs of sequences, scores samples for conditions never seen, and says whether that is enough."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from flowcore.errors import ConfigError
from training.cli import DONE, FAILED, STOPPED, parser, run_command
from training.stop import StopFlag

CONFIGS = Path(__file__).parent / "configs"
BUNDLED = ("curves", "rings")


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns 0 done, 1 failed or a limit missed, 2 unusable input, 3 stopped after saving."""
    made = parser(
        "sequences",
        "Train a Flux from one token sequence to another. The same command again continues the run.",
    )
    made.add_argument("config", help=f"YAML or TOML file, or a task that comes with it: {', '.join(BUNDLED)}")
    made.add_argument(
        "--set", action="append", default=[], metavar="KEY.PATH=VALUE", help="override a config key"
    )
    made.add_argument("--resume", default="latest", help="latest (default), none, or a checkpoint folder")
    stop = StopFlag()
    stop.listen()
    return run_command(lambda a: _run(a, stop), made.parse_args(arguments))


def _run(arguments: argparse.Namespace, stop: StopFlag) -> int:
    # Imported here, for these load pydantic and torch: a signal before that would end the process.
    from training.config import load_config
    from training.sequences.config import SequenceConfig
    from training.sequences.run import SCORE_FILE, missed, prepare, start

    is_bundled = arguments.config in BUNDLED
    path = CONFIGS / f"{arguments.config}.yaml" if is_bundled else Path(arguments.config)
    config = load_config(SequenceConfig, path, arguments.set)
    prepared = prepare(config)
    if not start(prepared, stop, arguments.resume):
        sys.stderr.write(f"stopped; the same command continues the run in {config.folder}\n")
        return STOPPED
    try:
        scores = json.loads((config.folder / SCORE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as err:
        raise ConfigError(
            f"{config.folder / SCORE_FILE} must be the run's scores, got {err}; delete it"
        ) from err
    faults = missed(scores, config.scoring.limits)
    for name, value in scores.items():
        limit = f" {faults[name]}" if name in faults else ""
        sys.stdout.write(f"{name} {value:.4f}{limit}\n")
    return FAILED if faults else DONE
