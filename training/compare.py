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
from training.scenes import Verdict, accuracy, captions_held_out, judge
from training.scenes.scene import ObjectCount

SEED = 2026
BATCH = 50
KINDS: dict[str, tuple[ObjectCount, ...]] = {"one": ("one",), "two": ("two",), "mixed": ("one", "two")}


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
    made.add_argument("--cfg", type=float, default=2.0, help="guidance scale (default: 2)")
    made.add_argument(
        "--vae", metavar="NAME", help="judge true pictures after this autoencoder instead (scenes-vae)"
    )
    made.add_argument(
        "--images", type=Path, metavar="DIR", help="keep the pictures, each with its caption, in DIR/NAME"
    )
    made.add_argument("--json", type=Path, metavar="FILE", help="write the results as JSON")
    return run_command(_compare, made.parse_args(arguments))


def _compare(arguments: argparse.Namespace) -> int:
    if arguments.count < len(KINDS[arguments.objects]):
        raise ConfigError(f"--count must be at least {len(KINDS[arguments.objects])}, got {arguments.count}")
    if arguments.vae:
        return _report(arguments, {arguments.vae: measure_vae(arguments.vae, arguments)})
    captions = draw_captions(arguments.count, arguments.objects)
    results = {name: measure(name, captions, arguments) for name in arguments.models or bundled_models()}
    return _report(arguments, results)


def _report(arguments: argparse.Namespace, results: dict[str, dict[str, Any]]) -> int:
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
    ]


def bundled_models() -> list[str]:
    """Names of the bundled diffusion models."""
    from flowcore.assets import list_builtin

    return [name for name in list_builtin() if name.endswith("-demo")]


def title(name: str) -> str:
    """What the table calls a model: name, stem of its file, or folder of a `model.safetensors`."""
    path = Path(name)
    return path.parent.name if path.name == "model.safetensors" and path.parent.name else path.stem


def measure(name: str, captions: Sequence[str], arguments: argparse.Namespace) -> dict[str, Any]:
    """Accuracy, size and speed of one model over the captions."""
    from flowcore.pipeline import Pipeline
    from flowcore.settings import Settings

    pipeline = Pipeline.from_files(name)
    settings = Settings(num_steps=arguments.steps, cfg_scale=arguments.cfg)
    folder = arguments.images / title(name) if arguments.images else None
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


def measure_vae(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Accuracy and PSNR in dB of held-out scenes after encoding and decoding."""
    import torch

    from flowcore.images import image_to_tensor, tensor_to_images
    from flowcore.vae.autoencoder import load_vae
    from training.objectives.autoencoder import psnr
    from training.scenes import draw, iterate_scenes

    autoencoder = load_vae(name, dtype=torch.float32)
    verdicts: list[Verdict] = []
    quality: list[float] = []
    started = time.perf_counter()
    scenes = iterate_scenes(arguments.count, SEED, objects=arguments.objects, split="test")
    for scene, caption in tqdm(scenes, total=arguments.count, desc=name, unit="image"):
        picture = draw(scene)
        pixels = image_to_tensor(picture, *picture.size)
        with torch.inference_mode():
            rebuilt = autoencoder.decode(autoencoder.encode(pixels))
        quality.append(psnr(rebuilt, pixels))
        verdicts.append(judge(tensor_to_images(rebuilt)[0], caption))
    return {
        "count": arguments.count,
        "accuracy": accuracy(verdicts),
        "psnr": sum(quality) / len(quality),
        "parameters": sum(p.numel() for p in autoencoder.module.parameters()),
        "seconds_per_image": (time.perf_counter() - started) / arguments.count,
    }


def _number(text: str | None) -> float | None:
    return None if text is None else float(text)


def table(results: dict[str, dict[str, Any]]) -> str:
    """The results as a Markdown table, shares in percent."""
    rows = [_cells(name, result) for name, result in results.items()]
    titles = [title for title in rows[0] if any(row[title] != "-" for row in rows)]
    lines = ["| " + " | ".join(titles) + " |", "| --- " * len(titles) + "|"]
    lines += ["| " + " | ".join(row[title] for title in titles) + " |" for row in rows]
    return "\n".join(lines)


def _cells(name: str, result: dict[str, Any]) -> dict[str, str]:
    """One row by column title; '-' where nothing was measured."""
    shares = {**result["accuracy"], "relation and color": result.get("relation_and_color")}
    minutes = result.get("train_seconds") and result["train_seconds"] / 60
    return {
        "model": title(name),
        "captions": str(result["count"]),
        **{title: _format(share and share * 100, "{:.1f}") for title, share in shares.items()},
        "PSNR dB": _format(result.get("psnr"), "{:.1f}"),
        "parameters": _format(result["parameters"] / 1e6, "{:.2f} M"),
        "s / image": _format(result["seconds_per_image"], "{:.2f}"),
        "training min": _format(minutes, "{:.0f}"),
    }


def _format(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


if __name__ == "__main__":
    sys.exit(main())
