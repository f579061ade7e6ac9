"""Folders that `training.trajectories` wrote: latents, captions, and the noise of the latents."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from training.data.sample import DataError, Sample, Stored
from training.encoders import ImageEncoder
from training.files import sha256
from training.stop import StopFlag

FORMAT = "flowcore.trajectories/1"
RESULT, SOURCE = "z0", "source_z0"
"""Names of a record's latents behind its key: the teacher's, and those of the picture before an edit."""
INDEX = "index.jsonl"
"""A line of provenance with the checksums of the shards, then a line a record."""
_AGAIN = "start the same python -m training.trajectories again"
_CLOSE = 2.0**-10


def name_of(number: int) -> str:
    """Key of a record."""
    return f"{number:06d}"


def draw_start(seed: int, shape: Sequence[int]) -> Tensor:
    """The noise `c h w`, float32, that a teacher started from."""
    return torch.randn((1, *shape), generator=torch.Generator("cpu").manual_seed(seed))[0]


def scan_trajectories(root: Path, where: str, stop: StopFlag, *, edits: bool = False) -> list[Sample]:
    """Records of a folder as samples, after a look at the checksum of every shard.

    edits: whether an edit for each record is to follow them, with the stored source or a composite.

    Raises: DataError that names the folder or file and the remedy; StoppedError.
    """
    index = root / INDEX
    try:
        header, *records = map(json.loads, index.read_text(encoding="utf-8").splitlines())
        samples = [_sample(record, header, root) for record in records]
        shards = {root / Path(name).name: str(value) for name, value in header["shards"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as err:
        raise DataError(
            f"{where}: {root} must hold the {INDEX} of training.trajectories, got {err!r}; {_AGAIN}"
        ) from err
    if header.get("format") != FORMAT:
        raise DataError(
            f"{where}: {index} must be of format {FORMAT}, got {header.get('format')!r}; {_AGAIN}"
        )
    if not samples:
        raise DataError(f"{where}: {root} must hold a finished shard, got none; {_AGAIN}")
    for path, expected in shards.items():
        stop.check()
        if not path.is_file() or sha256(path) != expected:
            raise DataError(f"{path} must be as it was written, got a missing or damaged file; {_AGAIN}")
    if not edits:
        return samples
    return samples + (
        [_sourced(s) for s in samples] if header.get("sources") else _composites(samples, where)
    )


def _sourced(sample: Sample) -> Sample:
    """The edit from a record's stored source, which its caption asks for."""
    assert sample.stored is not None
    stored = replace(sample.stored, source=f"{sample.key}.{SOURCE}")
    return replace(sample, key=f"{sample.key}.edit", stored=stored)


def _composites(samples: Sequence[Sample], where: str) -> list[Sample]:
    """An edit for each record: its caption asks for it, its source has a part of the next one of its shard.

    Raises: DataError if no shard holds two.
    """
    shards: dict[Path, list[Sample]] = defaultdict(list)
    for sample in samples:
        shards[sample.path].append(sample)
    found = []
    for group in shards.values():
        for sample, other in zip(group, [*group[1:], group[0]], strict=True):
            if sample.stored and other.stored and other is not sample:
                stored = replace(sample.stored, composite=other.stored.name)
                found.append(replace(sample, key=f"{sample.key}.edit", stored=stored))
    if not found:
        raise DataError(f"{where}: edits must have shards of two records or more, got one a shard")
    return found


def check_space(space: Mapping[str, Any], encoder: ImageEncoder, path: Path) -> None:
    """Compares the space of stored latents with that of a run. Raises: DataError if it is another."""
    facts = {part: encoder.facts.get(f"flowcore.latents_{part}") for part in ("mean", "std")}
    is_same = space["channels"] == encoder.channels and all(
        text is None or _is_close(space[part], json.loads(text)) for part, text in facts.items()
    )
    if not is_same:
        name = encoder.facts.get("flowcore.latent_spec", "pixels")
        raise DataError(
            f"{path} must hold latents of encoders.vae, {name} with {encoder.channels} channels, got "
            f"{space['space']} with {space['channels']}; make the trajectories with --vae"
        )


def _sample(record: Mapping[str, Any], header: Mapping[str, Any], root: Path) -> Sample:
    width, height = map(int, header["size"])
    key, shard = str(record["key"]), root / Path(record["shard"]).name
    stored = Stored(f"{key}.{RESULT}", record.get("noise_seed"), header["latents"])
    return Sample(key, shard, str(record["caption"]), width, height, stored=stored)


def _is_close(first: Sequence[float], second: Sequence[float]) -> bool:
    return len(first) == len(second) and all(
        math.isclose(a, b, rel_tol=_CLOSE, abs_tol=_CLOSE) for a, b in zip(first, second, strict=True)
    )
