"""What a dataset gives: samples, and files that are left out with their reasons."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from flowcore.errors import FlowCoreError
from training.config import Data
from training.stop import StopFlag

SOURCE_ENDING = ".source.png"
"""Behind the name of an image: the picture before the edit that its caption asks for."""
LATENTS, SOURCE_LATENTS = "latents", "source_latents"
"""Names in the `batch.safetensors` of runs."""
Setting = Literal["on_error", "missing_caption"]


class DataError(FlowCoreError):
    """A sample or a dataset cannot be used."""


class SampleError(DataError):
    """One file cannot be used; `setting` is the key of the section `data` that can leave it out instead."""

    def __init__(self, path: Path, reason: str, *, setting: Setting = "on_error", remedy: str = "") -> None:
        """Message of file, reason and remedy."""
        remedy = remedy or f"remove it or set data.{setting} to skip"
        super().__init__(f"{path}: {reason}; {remedy}")
        self.path, self.reason, self.setting = path, reason, setting


@dataclass(frozen=True, slots=True)
class Stored:
    """Latents that lie in a safetensors file under `name`.

    noise_seed: of the noise that they belong to, None where any does. space: of the latents, JSON-like, None
    where the file does not tell. source: the latents in the file that are the source of an edit. composite:
    other latents in the file, a rectangle of which makes this sample the source of an edit. others: what else
    of the sample is in the file, by the names of the `batch.safetensors` of runs; with `context` among it the
    caption is encoded already.
    """

    name: str
    noise_seed: int | None = None
    space: Mapping[str, Any] | None = field(default=None, hash=False)
    source: str | None = None
    composite: str | None = None
    others: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Sample:
    """One image file with its caption; `key` is the path relative to its dataset, sizes are in pixels.

    source: the picture before the edit that the caption asks for, None where the caption describes the image.
    answer: what a model is to say of an edit, None where that is not known; the last line says what the image
    shows.
    stored: the latents in the file, if it is none of an image.
    """

    key: str
    path: Path
    caption: str
    width: int
    height: int
    source: Path | None = None
    answer: str | None = None
    stored: Stored | None = None

    @property
    def is_edit(self) -> bool:
        """Whether there is a picture before the edit, or what it is encoded to."""
        stored = self.stored
        return self.source is not None or bool(
            stored and (stored.source or stored.composite or SOURCE_LATENTS in stored.others)
        )

    @property
    def is_told(self) -> bool:
        """Whether the file holds its caption as the model reads it."""
        return bool(self.stored and "context" in self.stored.others)


@dataclass(frozen=True, slots=True)
class Reject:
    """A file that was left out, and why."""

    path: Path
    reason: str


def read_usable(
    paths: Iterable[Path],
    read: Callable[[Path], Sample],
    data: Data,
    rejects: list[Reject],
    stop: StopFlag,
    need: str,
) -> list[Sample]:
    """Samples of files, without those that `data` lets be skipped, which are added to `rejects`.

    need: what the error says if none is left, such as `datasets.0.path: a must hold a usable image`.
    Raises: DataError for that, and for a file that is not to be skipped; StoppedError.
    """
    samples: list[Sample] = []
    refused: list[Reject] = []
    for path in paths:
        stop.check()
        try:
            samples.append(read(path))
        except SampleError as err:
            if not data.skips(err.setting):
                raise
            refused.append(Reject(err.path, err.reason))
    rejects += refused
    if not samples:
        raise DataError(f"{need}, got none; {refused[0].path}: {refused[0].reason}")
    return samples
