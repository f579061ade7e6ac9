"""Makes the bundled parts from drawn scenes: `python -m training.demo vae|text|model`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from training.cli import DONE, STOPPED, parser, run_command
from training.scenes import write_edits, write_folder
from training.scenes.scene import ObjectCount, Split
from training.stop import StopFlag

CONFIGS = Path(__file__).parent / "configs"
ARCHITECTURES = tuple(sorted(p.stem.removesuffix("_demo") for p in CONFIGS.glob("*_demo.yaml")))
TRAIN_COUNT, EDIT_COUNT, HELD_OUT_COUNT = 8000, 20000, 256
SHORT_MINUTES = 30
"""Shorter runs draw half of the scenes, and their models learn from those with one object alone."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    made = parser("demo", "Train a part of the bundled demo on drawn scenes; the same command continues it.")
    made.add_argument(
        "part", choices=("vae", "text", "model"), help="autoencoder, text encoder or flow model"
    )
    made.add_argument(
        "--arch", default="xut", choices=ARCHITECTURES, help="architecture of the model (default: xut)"
    )
    made.add_argument(
        "--out", type=Path, default=Path("runs/demo"), help="folder of scenes, runs and results"
    )
    made.add_argument("--minutes", type=float, help="fit the number of steps to this time on this machine")
    made.add_argument(
        "--resume", action="store_true", help="continue the run that lies in --out (the default)"
    )
    made.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a config key")
    return run_command(_demo, made.parse_args(arguments))


def _demo(arguments: argparse.Namespace) -> int:
    stop = StopFlag()
    stop.listen()
    out: Path = arguments.out
    is_short = arguments.minutes is not None and arguments.minutes < SHORT_MINUTES
    count = TRAIN_COUNT // 2 if is_short else TRAIN_COUNT
    write_scenes(out / "scenes", count)
    if arguments.part == "model" and arguments.arch == "exo":
        write_pairs(out / "scenes" / "edits", EDIT_COUNT // 2 if is_short else EDIT_COUNT)
    from training import demo_parts

    make = getattr(demo_parts, f"make_{arguments.part}")
    request = demo_parts.Request(
        out, arguments.arch, arguments.minutes, tuple(arguments.set), is_short=is_short
    )
    return DONE if make(request, stop) else STOPPED


def write_scenes(folder: Path, train_count: int) -> None:
    """Draws the demo's training folders and its held-out pictures, unless as many or more are there."""
    kinds: tuple[tuple[str, ObjectCount, int, int], ...] = (
        ("one", "one", train_count, 1),
        ("two", "two", train_count, 2),
        ("held-out", "mixed", HELD_OUT_COUNT, 3),
    )
    for name, objects, count, seed in kinds:
        target = folder / name
        if not _holds(target, count):
            split: Split = "test" if name == "held-out" else "train"
            write_folder(target, count, seed, objects=objects, split=split, is_forced=True)


def write_pairs(folder: Path, count: int) -> None:
    """Draws the edits that exo learns from, unless as many or more are there."""
    if not _holds(folder, count):
        write_edits(folder, count, 4, is_forced=True)


def _holds(folder: Path, count: int) -> bool:
    return folder.exists() and len(list(folder.glob("*.txt"))) >= count


if __name__ == "__main__":
    sys.exit(main())
