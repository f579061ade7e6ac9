"""The judge's table for the bundled demo models: `python -m training.compare`; and for edits, `--edits`."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from flowcore.errors import ConfigError
from training.cli import DONE, parser, run_command
from training.files import write_atomic
from training.scenes import Verdict, accuracy, captions_held_out, judge
from training.scenes.scene import ObjectCount

if TYPE_CHECKING:
    from flowcore.pipeline import Pipeline
    from flowcore.settings import Settings

SEED = 2026
BATCH = 50
EDIT_COLUMNS = {
    "said right": ("said_right", "{:.1f}"),
    "mask IoU": ("mask_iou", "{:.3f}"),
    "pixel IoU": ("pixel_iou", "{:.3f}"),
    "of true cells": ("pixel_iou_of_cells", "{:.3f}"),
    "kept dB": ("kept_psnr", "{:.1f}"),
    "unchanged dB": ("unchanged_psnr", "{:.1f}"),
    "of VAE": ("vae_psnr", "{:.1f}"),
}
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
        "--edits", action="store_true", help="let exo models edit pictures and compare with the true edits"
    )
    made.add_argument(
        "--preserve",
        type=float,
        default=1.0,
        help="with --edits: share by which stays what no mask marks (default: 1)",
    )
    made.add_argument(
        "--iterations", metavar="T,T...", help="refinements a step of exo models, a row for each number"
    )
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
    counts = parse_iterations(arguments.iterations)
    results: dict[str, dict[str, Any]] = {}
    for name in arguments.models or bundled_models(exo_only=arguments.edits or counts != [None]):
        results |= measure(name, counts, arguments)
    return _report(arguments, results)


def parse_iterations(text: str | None) -> list[int | None]:
    """The numbers of a list such as 1,2,4; the model's own for none. Raises: ConfigError."""
    if text is None:
        return [None]
    parts = text.split(",")
    if not all(part.strip().isdigit() for part in parts):
        raise ConfigError(f"--iterations must be numbers with commas, such as 1,2,4, got {text!r}")
    return [int(part) for part in parts]


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


def bundled_models(*, exo_only: bool = False) -> list[str]:
    """Names of the bundled diffusion models. Raises: ConfigError if there are none."""
    from flowcore.assets import list_builtin

    names = [
        name for name in list_builtin() if name.endswith("-demo") and (name.startswith("exo") or not exo_only)
    ]
    if not names:
        raise ConfigError("--models must name an exo model, for none is bundled, got none")
    return names


def title(name: str) -> str:
    """What the table calls a model: name, stem of its file, or folder of a `model.safetensors`."""
    path = Path(name)
    return path.parent.name if path.name == "model.safetensors" and path.parent.name else path.stem


def measure(
    name: str, counts: Sequence[int | None], arguments: argparse.Namespace
) -> dict[str, dict[str, Any]]:
    """Accuracy, size and speed of one model, for each number of iterations (None = its own)."""
    from flowcore.pipeline import Pipeline

    pipeline = Pipeline.from_files(name)
    metadata = pipeline.model.metadata
    labels = {name if count is None else f"{name} T={count}": count for count in counts}
    settings = {label: sampling_of(pipeline, count, arguments) for label, count in labels.items()}
    folders = {
        label: arguments.images and arguments.images / (title(name) + label.removeprefix(name))
        for label in labels
    }
    found = _shares(pipeline, settings, folders, arguments)
    return {
        label: {
            "model": name,
            "iterations": getattr(settings[label], "iterations", None),
            **found[label],
            "sampling": sampling_facts(settings[label]),
            "parameters": sum(p.numel() for p in pipeline.model.model.parameters()),
            "train_seconds": _number(metadata.get("flowcore.train_seconds")),
            "train_flops": _number(metadata.get("flowcore.train_flops")),
        }
        for label in labels
    }


def sampling_facts(settings: Settings) -> dict[str, Any]:
    """What makes the figures of a row again: seed of captions, edits and noise, steps, guidance, ..."""
    names = ("num_steps", "cfg_scale", "iterations", "preserve")
    known = {name: getattr(settings, name) for name in names if hasattr(settings, name)}
    return {"seed": SEED, **known}


def sampling_of(pipeline: Pipeline, count: int | None, arguments: argparse.Namespace) -> Settings:
    """The settings of a row. Raises: ConfigError if they are not for this model."""
    from flowcore.exo import ExoPipeline

    own: dict[str, Any] = {} if count is None else {"iterations": count}
    if arguments.edits:
        own["preserve"] = arguments.preserve
    if own and not isinstance(pipeline, ExoPipeline):
        option = "--edits" if arguments.edits else "--iterations"
        raise ConfigError(f"{option} must be for exo models, got a {pipeline.model.architecture.name} model")
    return pipeline.settings_type(num_steps=arguments.steps, cfg_scale=arguments.cfg, **own)


def _shares(
    pipeline: Pipeline,
    settings: Mapping[str, Settings],
    folders: Mapping[str, Path | None],
    arguments: argparse.Namespace,
) -> dict[str, dict[str, Any]]:
    """What the judge says of edits, or of pictures of captions, for each setting."""
    if not arguments.edits:
        captions = draw_captions(arguments.count, arguments.objects)
        return {
            label: measure_captions(pipeline, captions, own, label, folders[label])
            for label, own in settings.items()
        }
    from flowcore.exo import ExoPipeline, ExoSettings
    from training.edit_quality import measure_edits

    assert isinstance(pipeline, ExoPipeline)
    return measure_edits(
        pipeline,
        arguments.count,
        SEED,
        {label: ExoSettings.of(own) for label, own in settings.items()},
        batch=BATCH,
        objects=arguments.objects,
        folders=folders,
    )


def measure_captions(
    pipeline: Pipeline, captions: Sequence[str], settings: Settings, name: str, folder: Path | None = None
) -> dict[str, Any]:
    """Accuracy over captions, and seconds; pictures are kept in the folder."""
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
    related = [v for v in verdicts if v["relation"] is not None]
    return {
        "count": len(captions),
        "accuracy": accuracy(verdicts),
        "relation_and_color": sum(bool(v["relation"] and v["color"]) for v in related) / len(related)
        if related
        else None,
        "seconds_per_image": seconds / len(captions),
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
        "model": title(result.get("model", name)),
        "T": _format(result.get("iterations"), "{}"),
        "captions": str(result["count"]),
        **{title: _format(share and share * 100, "{:.1f}") for title, share in shares.items()},
        "PSNR dB": _format(result.get("psnr"), "{:.1f}"),
        **{title: _format(result.get(key), form) for title, (key, form) in EDIT_COLUMNS.items()},
        "parameters": _format(result["parameters"] / 1e6, "{:.2f} M"),
        "s / image": _format(result["seconds_per_image"], "{:.2f}"),
        "training min": _format(minutes, "{:.0f}"),
    }


def _format(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


if __name__ == "__main__":
    sys.exit(main())
