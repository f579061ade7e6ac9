"""How well an Exo edits: held-out edits of scenes, compared with the true ones."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from flowcore.errors import ConfigError
from flowcore.exo.masks import on_pixels
from flowcore.images import image_to_tensor, tensor_to_images
from flowcore.models.exo.labels import changed_cells
from flowcore.text.qwen3_vl import last_line
from training.data.sample import SOURCE_ENDING
from training.scenes import Edit, Verdict, accuracy, draw, iterate_edits, judge

if TYPE_CHECKING:
    from flowcore.exo import ExoInfo, ExoPipeline, ExoSettings
    from flowcore.vae.autoencoder import Autoencoder

MARKED = 0.5
"""Where a mask's value says that the model edits."""
CHANGED_LEVELS = 8
"""Of 255, in any channel: where source and target differ more, a pixel has changed."""
READING = ("encode image", "read prompt")
"""Stages of a run whose results are kept for the next one with the same prompts and pictures."""
ROUNDING = 1 / 12
"""Squared error in levels of 255 that a picture has for being stored in whole levels."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Truth:
    """An edit as it should be.

    source: the picture before it. changed, on_pixels: the pixels `y x` that change, and those of the cells
    `1 hm wm` whose latents change. vae_psnr: dB of the source after the autoencoder, in the other cells.
    """

    edit: Edit
    source: Image.Image
    changed: NDArray[np.bool_]
    cells: Tensor
    on_pixels: NDArray[np.bool_]
    vae_psnr: float | None

    @classmethod
    def of(cls, vae: Autoencoder, edit: Edit, side: int) -> Truth:
        """The truth of a drawn edit of so many pixels a side."""
        return cls.between(vae, edit, draw(edit.source, side), draw(edit.target, side))

    @classmethod
    @torch.inference_mode()
    def between(cls, vae: Autoencoder, edit: Edit, source: Image.Image, target: Image.Image) -> Truth:
        """The truth of two pictures."""
        first, second = (vae.encode(image_to_tensor(picture, *picture.size)) for picture in (source, target))
        before, after, rebuilt = map(pixels_of, (source, target, tensor_to_images(vae.decode(first))[0]))
        cells = changed_cells(first, second).cpu()
        rows, columns = first.shape[-2:]
        spread = on_pixels(cells.float(), (rows, columns), source.height // rows, "nearest")
        where = spread[0].numpy() >= MARKED
        return cls(
            edit=edit,
            source=source,
            changed=np.abs(before.astype(int) - after).max(axis=2) > CHANGED_LEVELS,
            cells=cells,
            on_pixels=where,
            vae_psnr=psnr_where(rebuilt, before, ~where),
        )


@dataclass(slots=True)
class Tally:
    """What was found of edits made with one setting; folder: where to keep sources, results and masks."""

    settings: ExoSettings
    folder: Path | None
    edits: list[Edit] = field(default_factory=list)
    rows: list[dict[str, float | None]] = field(default_factory=list)
    verdicts: list[Verdict] = field(default_factory=list)
    seconds: float = 0.0

    def add(self, pipeline: ExoPipeline, truths: Sequence[Truth], first: int, reading: float | None) -> float:
        """Make edits with seeds from `first` on; return the seconds that reading prompts and pictures takes.

        reading: of the same edits with another setting, which count in place of these: all is kept by then.
        """
        started = time.perf_counter()
        made = pipeline.refine(
            [truth.edit.instruction for truth in truths],
            list(range(first, first + len(truths))),
            self.settings,
            init_images=[truth.source for truth in truths],
        )
        seconds = time.perf_counter() - started
        own = sum(made[0].info.timings.get(stage, 0.0) for stage in READING)
        reading = own if reading is None else reading
        self.seconds += seconds - own + reading
        for number, (truth, one) in enumerate(zip(truths, made, strict=True), first):
            self.edits.append(truth.edit)
            self.rows.append(compare_edit(truth, one.image, one.info))
            self.verdicts.append(judge(one.image, truth.edit.caption))
            if self.folder:
                _keep(self.folder / f"{number:06d}", truth, one.image, one.info)
        return reading

    def summary(self) -> dict[str, Any]:
        """Means over the edits, by the names of `measure_edits`."""
        return {
            "count": len(self.edits),
            "accuracy": accuracy(self.verdicts),
            **{key: _mean([row[key] for row in self.rows]) for key in self.rows[0]},
            "success_by_kind": _by_kind(self.edits, self.verdicts),
            "seconds_per_image": self.seconds / len(self.edits),
        }


def measure_edits(
    pipeline: ExoPipeline,
    count: int,
    seed: int,
    settings: Mapping[str, ExoSettings],
    *,
    batch: int,
    objects: str,
    folders: Mapping[str, Path | None] | None = None,
) -> dict[str, dict[str, Any]]:
    """Means over held-out edits, for each setting; what does not depend on it is computed once.

    mask_iou, pixel_iou: overlap of the mask with the cells whose latents change, and with the pixels that
    change; pixel_iou_of_cells: the latter for a mask of the true cells. kept_psnr: dB between result and
    source in the cells that the mask leaves alone; unchanged_psnr: in the cells that do not change; vae_psnr:
    the same for the source after the autoencoder. said_right: percent of the requests that the model rewrites
    as the edit's answer has it, None if it rewrites none. accuracy: what the judge finds right of the target,
    `all` being success. seconds_per_image: with the reading of prompts and pictures, for every setting.

    Args:
        pipeline: a model with its parts.
        count: number of edits.
        seed: of edits and noise.
        settings: of the sampling by name; without size.
        batch: edits at a time.
        objects: in a source: one, two or mixed.
        folders: where to keep sources, results and masks of a name.

    Raises: ConfigError if the model's pictures are not square.
    """
    width = _side(pipeline)
    edits = [edit for edit, _ in iterate_edits(count, seed, objects=objects, split="test")]  # type: ignore[arg-type]
    tallies = {name: Tally(own, (folders or {}).get(name)) for name, own in settings.items()}
    pipeline.prefixes.kept, pipeline.encoded.kept = 2 * batch, batch
    with tqdm(total=len(settings) * -(-count // batch), desc="edits", unit="batch") as bar:
        for first in range(0, count, batch):
            part = edits[first : first + batch]
            truths = [Truth.of(pipeline.vae, edit, width) for edit in part]
            reading: float | None = None
            for tally in tallies.values():
                reading = tally.add(pipeline, truths, first, reading)
                bar.update()
    return {name: tally.summary() for name, tally in tallies.items()}


def _side(pipeline: ExoPipeline) -> int:
    width, height = pipeline.default_size
    if width != height:
        raise ConfigError(f"the model's pictures must be square to show scenes, got {width}x{height}")
    return width


def compare_edit(truth: Truth, result: Image.Image, info: ExoInfo) -> dict[str, float | None]:
    """Overlaps and qualities of one edit, by the names of `measure_edits`."""
    shown, before = pixels_of(result), pixels_of(truth.source)
    marked = info.on_pixels(mode="nearest")[0].numpy() >= MARKED
    is_right = info.prompt == last_line(truth.edit.answer)
    return {
        "mask_iou": overlap(info.mask >= MARKED, truth.cells),
        "pixel_iou": overlap(marked, truth.changed),
        "pixel_iou_of_cells": overlap(truth.on_pixels, truth.changed),
        "kept_psnr": psnr_where(shown, before, ~marked),
        "unchanged_psnr": psnr_where(shown, before, ~truth.on_pixels),
        "vae_psnr": truth.vae_psnr,
        "said_right": None if info.prompt == truth.edit.instruction else 100.0 * is_right,
    }


def pixels_of(picture: Image.Image) -> NDArray[np.uint8]:
    """Pixels `y x 3`."""
    return np.asarray(picture.convert("RGB"))


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


def _keep(path: Path, truth: Truth, result: Image.Image, info: ExoInfo) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    truth.source.save(path.with_suffix(SOURCE_ENDING))
    info.mask_image("nearest").save(path.with_suffix(".mask.png"))
    result.save(path.with_suffix(".png"))
    path.with_suffix(".txt").write_text(f"{truth.edit.instruction}\n{truth.edit.caption}\n", encoding="utf-8")
