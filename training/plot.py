"""Draws the loss curves of runs into one picture: `python -m training.plot RUN_DIR...`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from flowcore.errors import ConfigError
from training.cli import DONE, parser, run_command


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    made = parser("plot", "Draw the loss curves of runs into one picture.")
    made.add_argument("runs", nargs="+", type=Path, metavar="RUN_DIR", help="folders that hold a metrics.csv")
    made.add_argument("--out", type=Path, help="PNG to write (default: plots/loss.png of the first run)")
    return run_command(_plot, made.parse_args(arguments))


def _plot(arguments: argparse.Namespace) -> int:
    from training.log import plot_loss

    for folder in arguments.runs:
        if not (folder / "metrics.csv").is_file():
            raise ConfigError(f"{folder}: the run folder must hold a metrics.csv, found none")
    target = arguments.out or arguments.runs[0] / "plots" / "loss.png"
    plot_loss(arguments.runs, target)
    sys.stdout.write(f"{target}\n")
    return DONE


if __name__ == "__main__":
    sys.exit(main())
