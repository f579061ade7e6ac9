"""The judge's table for the bundled demo models: `python -m training.compare`."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from flowcore.errors import ConfigError
from training.cli import DONE, parser, run_command
from training.files import write_atomic
from training.scenes import ATTRIBUTES, Verdict, accuracy, captions_held_out, judge

SEED = 2026
BATCH = 50
KINDS = {"one": ("one",), "two": ("two",), "mixed": ("one", "two")}


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    made = parser(
        "compare",
        "Sample captions that no model was trained on and let the judge say what the pictures show.",
    )
    made.add_argument(
        "--models", nargs="+", metavar="NAME", help="bundled names or files (default: all bundled models)"
    )
    made.add_argument("--count", type=int, default=500, help="captions for each model (default: 500)")
    made.add_argument(
        "--objects", choices=tuple(KINDS), default="mixed", help="objects in a caption (default: mixed)"
    )
    made.add_argument("--steps", type=int, default=20, help="Euler steps (default: 20)")
    made.add_argument("--cfg", type=float, default=3.0, help="guidance scale (default: 3)")
    made.add_argument(
        "--images", type=Path, metavar="DIR", help="keep the pictures, each with its caption, in DIR/NAME"
    )
    made.add_argument("--json", type=Path, metavar="FILE", help="write the results as JSON")
    return run_command(_compare, made.parse_args(arguments))


def _compare(arguments: argparse.Namespace) -> int:
    if arguments.count < len(KINDS[arguments.objects]):
        raise ConfigError(f"--count must be at least {len(KINDS[arguments.objects])}, got {arguments.count}")
    captions = draw_captions(arguments.count, arguments.objects)
    results = {name: measure(name, captions, arguments) for name in arguments.models or bundled_models()}
    sys.stdout.write(table(results) + "\n")
    if arguments.json:
        write_atomic(arguments.json, json.dumps({"models": results}, indent=1) + "\n")
    return DONE


def draw_captions(count: int, objects: str) -> list[str]:
    """Held-out captions, from a seed of their own; mixed ones are half of either kind."""
    kinds = KINDS[objects]
    shares = [count // len(kinds) + (i < count % len(kinds)) for i in range(len(kinds))]
    return [
        c for kind, share in zip(kinds, shares, strict=True) for c in captions_held_out(share, SEED, kind)
    ]  # type: ignore[arg-type]


def bundled_models() -> list[str]:
    """Names of the bundled diffusion models."""
    from flowcore.assets import list_builtin

    return [name for name in list_builtin() if name.endswith("-demo")]


def measure(name: str, captions: Sequence[str], arguments: argparse.Namespace) -> dict[str, Any]:
    """Accuracy, size and speed of one model over the captions."""
    from flowcore.pipeline import Pipeline, Settings

    pipeline = Pipeline.from_files(name)
    settings = Settings(num_steps=arguments.steps, cfg_scale=arguments.cfg)
    folder = arguments.images / Path(name).stem if arguments.images else None
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
    verdicts: list[Verdict] = []
    seconds = 0.0
    for first in tqdm(range(0, len(captions), BATCH), desc=name, unit="batch"):
        prompts = captions[first : first + BATCH]
        started = time.perf_counter()
        pictures = pipeline.generate(prompts, list(range(first, first + len(prompts))), settings)
        seconds += time.perf_counter() - started
        for number, (picture, caption) in enumerate(zip(pictures, prompts, strict=True), first):
            verdicts.append(judge(picture, caption))
            if folder:
                picture.save(folder / f"{number:06d}.png")
                (folder / f"{number:06d}.txt").write_text(caption + "\n", encoding="utf-8")
    metadata = pipeline.model.metadata
    related = [v for v in verdicts if v["relation"] is not None]
    return {
        "count": len(captions),
        "accuracy": accuracy(verdicts),
        "relation_and_color": sum(bool(v["relation"] and v["color"]) for v in related) / len(related)
        if related
        else None,
        "parameters": sum(p.numel() for p in pipeline.model.model.parameters()),
        "seconds_per_image": seconds / len(captions),
        "train_seconds": _number(metadata.get("flowcore.train_seconds")),
        "train_flops": _number(metadata.get("flowcore.train_flops")),
    }


def _number(text: str | None) -> float | None:
    return None if text is None else float(text)


def table(results: dict[str, dict[str, Any]]) -> str:
    """The results as a Markdown table, shares in percent."""
    columns = [*ATTRIBUTES, "all"]
    titles = ["model", "captions", *columns, "relation and colors", "parameters", "s / image", "training min"]
    lines = ["| " + " | ".join(titles) + " |", "| --- " * len(titles) + "|"]
    for name, row in results.items():
        shares = [*(row["accuracy"][column] for column in columns), row["relation_and_color"]]
        seconds = row["train_seconds"]
        cells = [
            Path(name).stem,
            str(row["count"]),
            *("-" if share is None else f"{share * 100:.1f}" for share in shares),
            f"{row['parameters'] / 1e6:.2f} M",
            f"{row['seconds_per_image']:.2f}",
            "-" if seconds is None else f"{seconds / 60:.0f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
