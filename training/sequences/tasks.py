"""Pairs of a condition and data: two drawn tasks whose answers are known, and pairs from a file."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Generator, Tensor

from flowcore.errors import CheckpointError, ConfigError
from flowcore.flux import Fourier
from flowcore.weights.checkpoint import read_tensors
from training.data.order import BatchOrder
from training.keys import generator

Measure = Callable[[Tensor, "Pairs"], dict[str, float]]

CURVE = Fourier(harmonics=3, count=24)
RING_POINTS, RING_WIDTH, RADII = 16, 0.05, (0.5, 2.0)
FIT_COUNT = 4096
MAX_HELD_OUT_SHARE = 0.2


class Pairs(NamedTuple):
    """A batch of samples: condition `b ...`, data `b ...`, and the data-space samples where paths begin."""

    condition: Tensor
    data: Tensor
    source: Tensor | None = None

    def part(self, rows: slice) -> Pairs:
        """Some of the pairs."""
        return Pairs(
            self.condition[rows], self.data[rows], None if self.source is None else self.source[rows]
        )


class PairSource(Protocol):
    """Where a run's pairs are from.

    Attributes:
        known: pairs that the statistics of the spaces are taken from.
        held_out: pairs that are never trained on.
        measure: names and measurements of samples made for the held-out conditions.
    """

    known: Pairs
    held_out: Pairs
    measure: Measure

    def batch(self, step: int) -> Pairs:
        """The global batch of a step (from 0)."""

    def keys(self, step: int) -> list[str]:
        """Names of the pairs of that batch."""


def relative_rmse(made: Tensor, data: Tensor) -> float:
    """Root mean square error over the standard deviation of the data."""
    return float((made - data).square().mean().sqrt() / data.std(correction=0))


def measure_map(made: Tensor, held_out: Pairs) -> dict[str, float]:
    """How near samples are to the data; and to that of other conditions, sqrt(2) if conditions decide."""
    data = held_out.data.float()
    return {
        "relative_rmse": relative_rmse(made.float(), data),
        "shuffled": relative_rmse(made.float().roll(1, 0), data),
    }


def draw_curves(count: int, draw: Generator) -> Pairs:
    """Closed curves of three random harmonics: the condition in frequencies, the data as points."""
    curve = CURVE.decode(torch.randn(count, CURVE.harmonics, CURVE.channels, generator=draw))
    return Pairs(curve, curve)


def draw_rings(count: int, draw: Generator) -> Pairs:
    """Radii `b 1 1`, and for each a set of points `b n 2` near the circle of that radius."""
    low, high = RADII
    radius = low + (high - low) * torch.rand(count, 1, 1, generator=draw)
    angle = 2 * math.pi * torch.rand(count, RING_POINTS, generator=draw)
    length = radius[..., 0] + RING_WIDTH * torch.randn(count, RING_POINTS, generator=draw)
    return Pairs(radius, torch.stack((angle.cos(), angle.sin()), dim=-1) * length[..., None])


def measure_rings(made: Tensor, held_out: Pairs) -> dict[str, float]:
    """Mean distance of points from their circle, and mean length of a set's average unit vector.

    The data itself has 0.040, and 0.225 as the angles are independent and uniform.
    """
    length = made.norm(dim=-1, keepdim=True)
    return {
        "radius_error": float((length - held_out.condition).abs().mean()),
        "resultant": float((made / length).mean(dim=1).norm(dim=-1).mean()),
    }


class Drawn:
    """An endless source: every batch is drawn anew, from the seed and the step alone."""

    def __init__(
        self,
        draw: Callable[[int, Generator], Pairs],
        measure: Measure,
        *,
        seed: int,
        batch_size: int,
        held_out: int,
    ) -> None:
        """Draws the pairs that are known at the start."""
        self.draw, self.measure, self.seed, self.batch_size = draw, measure, seed, batch_size
        self.known = draw(FIT_COUNT, generator(seed, "known"))
        self.held_out = draw(held_out, generator(seed, "held-out"))

    def batch(self, step: int) -> Pairs:
        """The global batch of a step."""
        return self.draw(self.batch_size, generator(self.seed, "pairs", step))

    def keys(self, step: int) -> list[str]:
        """Places in the endless sequence."""
        return [str(step * self.batch_size + i) for i in range(self.batch_size)]


class Stored:
    """The pairs of a file; the last of them are held out."""

    def __init__(self, pairs: Pairs, *, seed: int, batch_size: int, held_out: int) -> None:
        """Parts the pairs. At most a fifth is held out."""
        self.measure: Measure = measure_map
        total = len(pairs.data)
        kept = total - min(held_out, int(total * MAX_HELD_OUT_SHARE))
        self.known, self.held_out = pairs.part(slice(kept)), pairs.part(slice(kept, None))
        self.order = BatchOrder(seed, (kept,), batch_size)

    def batch(self, step: int) -> Pairs:
        """The global batch of a step."""
        rows = torch.tensor(self.order.batch(step)[1])
        source = self.known.source
        return Pairs(
            self.known.condition[rows], self.known.data[rows], None if source is None else source[rows]
        )

    def keys(self, step: int) -> list[str]:
        """Rows of the file."""
        return [str(row) for row in self.order.batch(step)[1]]


@dataclass(frozen=True, slots=True)
class Task:
    """A drawn task."""

    draw: Callable[[int, Generator], Pairs]
    measure: Measure


TASKS: Mapping[str, Task] = {
    "curves": Task(draw_curves, measure_map),
    "rings": Task(draw_rings, measure_rings),
}


def open_task(name: str, *, is_paired: bool, seed: int, batch_size: int, held_out: int) -> PairSource:
    """The pairs of a drawn task or of a file.

    Raises: ConfigError for an unknown task or for pairs that do not fit each other; CheckpointError for a
        file that cannot be read.
    """
    path = Path(name).expanduser()
    if name in TASKS:
        if is_paired:
            raise ConfigError(
                f"source must be noise for the task {name}, got paired; give a file with source"
            )
        task = TASKS[name]
        return Drawn(task.draw, task.measure, seed=seed, batch_size=batch_size, held_out=held_out)
    if path.suffix not in (".safetensors", ".npz"):
        raise ConfigError(
            f"task must be one of {', '.join(TASKS)} or a .safetensors or .npz file, got {name!r}"
        )
    return Stored(read_pairs(path, is_paired=is_paired), seed=seed, batch_size=batch_size, held_out=held_out)


def read_pairs(path: Path, *, is_paired: bool) -> Pairs:
    """The pairs of a file: `condition`, `data` and, if paired, `source`, a sample a row."""
    arrays = _read_npz(path) if path.suffix == ".npz" else read_tensors(path)[0]
    names = ("condition", "data", *(("source",) if is_paired else ()))
    missing = [name for name in names if name not in arrays]
    if missing:
        raise ConfigError(f"{path} must hold {', '.join(names)}, got no {missing[0]} among {sorted(arrays)}")
    counts = {name: len(arrays[name]) for name in names}
    if len(set(counts.values())) > 1 or counts["data"] < 2 / MAX_HELD_OUT_SHARE:
        raise ConfigError(
            f"{path} must hold as many rows of each, {2 / MAX_HELD_OUT_SHARE:.0f} or more, got {counts}"
        )
    return Pairs(*(arrays[name] for name in names))


def _read_npz(path: Path) -> dict[str, Tensor]:
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: torch.from_numpy(file[name]) for name in file.files}
    except (OSError, ValueError, TypeError, zipfile.BadZipFile) as err:
        raise CheckpointError(f"{path} must be an .npz file of numbers, got {err}") from err
