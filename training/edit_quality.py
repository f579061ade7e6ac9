"""How well an Exo edits: held-out edits of scenes, compared with the true ones."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from flowcore.errors import ConfigError
from flowcore.images import image_to_tensor, tensor_to_images
from flowcore.models.exo.labels import changed_cells
from training.data.sample import SOURCE_ENDING
from training.scenes import Edit, Verdict, accuracy, draw, iterate_edits, judge

if TYPE_CHECKING:
    from flowcore.exo import ExoInfo, ExoPipeline, ExoSettings
    from flowcore.vae.autoencoder import Autoencoder

MARKED = 0.5
"""Where a mask's value says that the model edits."""
CHANGED_LEVELS = 8
"""Of 255, in any channel: where source and target differ more, a pixel has changed."""
ROUNDING = 1 / 12
"""Squared error in levels of 255 that a picture has for being stored in whole levels."""


def measure_edits(
    pipeline: ExoPipeline,
    count: int,
    seed: int,
    settings: ExoSettings,
    *,
    batch: int,
    objects: str,
    name: str,
    folder: Path | None = None,
) -> dict[str, Any]:
    """Means over held-out edits.

    mask_iou, pixel_iou: overlap of the mask with the cells whose latents change, and with the pixels that
    change; pixel_iou_of_cells: the latter for a mask of the true cells. kept_psnr: dB between result and
    source in the cells that the mask leaves alone; unchanged_psnr: in the cells that do not change; vae_psnr:
    the same for the source after the autoencoder. accuracy: what the judge finds right of the target, `all`
    being success.

    Args:
        pipeline: a model with its parts.
        count: number of edits.
        seed: of edits and noise.
        settings: of the sampling; without size.
        batch: edits at a time.
        objects: in a source: one, two or mixed.
        name: for the progress bar.
        folder: where to keep sources, results and masks.

    Raises: ConfigError if the model's pictures are not square.
    """
    width = _side(pipeline)
    edits = [edit for edit, _ in iterate_edits(count, seed, objects=objects, split="test")]  # type: ignore[arg-type]
    rows: list[dict[str, float | None]] = []
    verdicts: list[Verdict] = []
    seconds = 0.0
    for first in tqdm(range(0, count, batch), desc=name, unit="batch"):
        part = edits[first : first + batch]
        sources = [draw(edit.source, width) for edit in part]
        started = time.perf_counter()
        instructions, seeds = [edit.instruction for edit in part], range(first, first + len(part))
        made = pipeline.refine(instructions, list(seeds), settings, init_images=sources)
        seconds += time.perf_counter() - started
        for number, (edit, source, result) in enumerate(zip(part, sources, made, strict=True), first):
            rows.append(
                compare_edit(pipeline.vae, source, draw(edit.target, width), result.image, result.info)
            )
            verdicts.append(judge(result.image, edit.caption))
            if folder:
                _keep(folder / f"{number:06d}", edit, source, result.image, result.info)
    return {
        "count": count,
        "accuracy": accuracy(verdicts),
        **{key: _mean([row[key] for row in rows]) for key in rows[0]},
        "success_by_kind": _by_kind(edits, verdicts),
        "seconds_per_image": seconds / count,
    }


def _side(pipeline: ExoPipeline) -> int:
    width, height = pipeline.default_size
    if width != height:
        raise ConfigError(f"the model's pictures must be square to show scenes, got {width}x{height}")
    return width


def compare_edit(
    vae: Autoencoder, source: Image.Image, target: Image.Image, result: Image.Image, info: ExoInfo
) -> dict[str, float | None]:
    """Overlaps and qualities of one edit, by the names of `measure_edits`."""
    before, after, shown = (np.asarray(picture.convert("RGB")) for picture in (source, target, result))
    with torch.inference_mode():
        pixels = [image_to_tensor(picture, *picture.size) for picture in (source, target)]
        first, second = (vae.encode(each) for each in pixels)
        rebuilt = np.asarray(tensor_to_images(vae.decode(first))[0])
    cells = changed_cells(first, second)
    true_cells = info.on_pixels(cells.float().cpu(), mode="nearest")[0].numpy() >= MARKED
    marked = info.on_pixels(mode="nearest")[0].numpy() >= MARKED
    changed = np.abs(before.astype(int) - after).max(axis=2) > CHANGED_LEVELS
    return {
        "mask_iou": overlap(info.mask >= MARKED, cells.cpu()),
        "pixel_iou": overlap(marked, changed),
        "pixel_iou_of_cells": overlap(true_cells, changed),
        "kept_psnr": psnr_where(shown, before, ~marked),
        "unchanged_psnr": psnr_where(shown, before, ~true_cells),
        "vae_psnr": psnr_where(rebuilt, before, ~true_cells),
    }


def overlap(first: Tensor | NDArray[np.bool_], second: Tensor | NDArray[np.bool_]) -> float:
    """Intersection over union of two masks of one shape; 1 if both are empty."""
    union = int((first | second).sum())
    return int((first & second).sum()) / union if union else 1.0


def psnr_where(first: NDArray[np.uint8], second: NDArray[np.uint8], where: NDArray[np.bool_]) -> float | None:
    """Peak signal-to-noise ratio in dB of pictures `y x 3` at pixels `y x`, None if there are none.

    At most 58.9, the value of an error as large as that of rounding.
    """
    if not where.any():
        return None
    error = (first[where].astype(float) - second[where]) ** 2
    return 10 * math.log10(255**2 / max(float(error.mean()), ROUNDING))


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _by_kind(edits: Sequence[Edit], verdicts: Sequence[Verdict]) -> dict[str, float]:
    found: dict[str, list[bool]] = defaultdict(list)
    for edit, verdict in zip(edits, verdicts, strict=True):
        found[edit.kind].append(bool(verdict["all"]))
    return {kind: sum(values) / len(values) for kind, values in sorted(found.items())}


def _keep(path: Path, edit: Edit, source: Image.Image, result: Image.Image, info: ExoInfo) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    source.save(path.with_suffix(SOURCE_ENDING))
    info.mask_image("nearest").save(path.with_suffix(".mask.png"))
    result.save(path.with_suffix(".png"))
    path.with_suffix(".txt").write_text(f"{edit.instruction}\n{edit.caption}\n", encoding="utf-8")
