"""Writes the weights of a finished or running run: `python -m training.export RUN_DIR OUT.safetensors`."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError

from flowcore.errors import ConfigError
from training.cli import DONE, parser, run_command
from training.config import RunConfig, load_config

if TYPE_CHECKING:
    from torch import Tensor

    from training.state import Checkpoint

ATTEMPTS = 3


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    made = parser("export", "Write the weights of a run's checkpoint as one safetensors file.")
    made.add_argument("run", type=Path, metavar="RUN_DIR", help="folder of the run")
    made.add_argument("out", type=Path, metavar="OUT.safetensors", help="file to write")
    made.add_argument("--ema", action="store_true", help="the averaged weights instead of the live ones")
    made.add_argument("--step", type=int, help="the checkpoint of this step (default: the newest)")
    made.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="default: output.dtype of the run"
    )
    return run_command(_export, made.parse_args(arguments))


def _export(arguments: argparse.Namespace) -> int:
    from training.assemble import save_weights

    if arguments.out.suffix != ".safetensors":
        raise ConfigError(f"OUT must end in .safetensors, got {arguments.out}")
    config = load_config(RunConfig, arguments.run / "config.yaml", [])
    if arguments.ema and config.ema.decay is None:
        raise ConfigError(f"{arguments.run}: --ema needs a run with ema.decay, this one keeps no average")
    step, state = read_weights(arguments.run, arguments.step, use_average=arguments.ema)
    save_weights(state, arguments.out, config, step=step, dtype=arguments.dtype)
    sys.stdout.write(f"{arguments.out}: step {step}\n")
    return DONE


def read_weights(run: Path, step: int | None, *, use_average: bool) -> tuple[int, dict[str, Tensor]]:
    """Step and weights of a checkpoint (the newest for step None); a running run may delete it meanwhile.

    Raises: ConfigError, CheckpointError if there is none.
    """

    def once() -> tuple[int, dict[str, Tensor]]:
        checkpoint = _find(run / "checkpoints", step)
        average = checkpoint.tensors("ema") if use_average else {}
        return checkpoint.step, checkpoint.tensors("weights") | average

    for _ in range(ATTEMPTS - 1):
        with contextlib.suppress(FileNotFoundError, SafetensorError):
            return once()
    return once()


def _find(folder: Path, step: int | None) -> Checkpoint:
    """The checkpoint of a step, or the newest sound one. Raises: ConfigError, CheckpointError."""
    from training.state import checkpoint_steps, newest_checkpoint, read_checkpoint

    if step is None:
        warnings: list[str] = []
        newest = newest_checkpoint(folder, warnings)
        sys.stderr.writelines(line + "\n" for line in warnings)
        if newest is None:
            raise ConfigError(f"{folder.parent}: the run folder must hold a checkpoint, found none")
        return newest
    found = checkpoint_steps(folder)
    if step not in found:
        known = ", ".join(map(str, sorted(found))) or "none"
        raise ConfigError(f"--step must be that of a checkpoint of {folder.parent} ({known}), got {step}")
    return read_checkpoint(found[step])


if __name__ == "__main__":
    sys.exit(main())
