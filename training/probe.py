"""Whether a model hears its captions: `python -m training.probe RUN_DIR`, early in a run.

The loss of a sample's own caption is compared with that of the caption with one word changed, at the same
noise. A word that is heard makes the own caption win; long before pictures show it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from flowcore.errors import ConfigError
from training.cli import DONE, parser, run_command
from training.config import RunConfig, load_config
from training.files import write_atomic
from training.scenes.swaps import SWAPS, swap_word

if TYPE_CHECKING:
    from training.objectives.flow_matching import FlowMatchingObjective

BATCH = 32
STREAM = 0x9EAD


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    made = parser(
        "probe", "Compare the losses of captions of scenes with those of captions with one word changed."
    )
    made.add_argument("run", type=Path, metavar="RUN_DIR", help="folder of a run on drawn scenes")
    made.add_argument("--count", type=int, default=64, help="captions for each kind of word (default: 64)")
    made.add_argument(
        "--level", type=float, default=0.9, help="noise level in (0, 1), 1 = noise (default: 0.9)"
    )
    made.add_argument("--json", type=Path, metavar="FILE", help="write the figures as JSON")
    return run_command(_probe, made.parse_args(arguments))


def _probe(arguments: argparse.Namespace) -> int:
    if arguments.count < 1 or not 0 < arguments.level < 1:
        raise ConfigError(
            f"--count must be at least 1 and --level lie between 0 and 1, got {arguments.count} and "
            f"{arguments.level}"
        )
    step, objective = load_run(arguments.run)
    rows = {kind: compare_words(objective, kind, arguments.count, arguments.level) for kind in SWAPS}
    lines = [
        f"step {step}, noise level {arguments.level}",
        f"{'word':<12}{'heard':>8}{'loss':>9}{'count':>7}",
    ]
    lines += [
        f"{kind:<12}{row['heard']:>8.3f}{row['rise']:>+9.2%}{row['count']:>7.0f}"
        for kind, row in rows.items()
        if row["count"]
    ]
    sys.stdout.write("\n".join(lines) + "\n")
    if arguments.json:
        write_atomic(arguments.json, json.dumps({"step": step, "words": rows}, indent=1) + "\n")
    return DONE


def load_run(folder: Path) -> tuple[int, FlowMatchingObjective]:
    """The step of a run's newest checkpoint, and its objective with the weights of it, averaged if they are.

    Raises: ConfigError if there is none.
    """
    import torch

    from training.assemble import build_objective, prepare
    from training.export import read_weights
    from training.launch import pick_device
    from training.stop import StopFlag

    config = load_config(RunConfig, folder / "config.yaml", [])
    step, weights = read_weights(folder, None, use_average=config.ema.decay is not None)
    objective = build_objective(prepare(config), pick_device(), StopFlag())
    module = objective.module.eval()
    with torch.no_grad():
        module.load_state_dict({**module.state_dict(), **weights})
    return step, objective


def compare_words(objective: FlowMatchingObjective, kind: str, count: int, level: float) -> dict[str, float]:
    """Share of captions that win against the same with another word of a kind, and by how much loss rises."""
    import torch

    rng = np.random.default_rng(STREAM)
    pairs: list[tuple[int, str, str]] = []
    for number in rng.permutation(len(objective.data.samples)).tolist():
        caption = objective.data.samples[number].caption
        other = swap_word(caption, kind, rng)
        if other is not None and len(pairs) < count:
            pairs.append((number, caption, other))
    own, changed = [], []
    with torch.no_grad():
        for number, caption, other in pairs:
            found = objective.errors([number, number], [caption, other], level)
            own.append(float(found[0]))
            changed.append(float(found[1]))
    if not pairs:
        return {"count": 0.0, "heard": 0.0, "rise": 0.0}
    wins = sum(a < b for a, b in zip(own, changed, strict=True))
    return {"count": float(len(pairs)), "heard": wins / len(pairs), "rise": sum(changed) / sum(own) - 1}


if __name__ == "__main__":
    sys.exit(main())
