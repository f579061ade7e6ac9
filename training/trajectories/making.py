"""Makes the records that are not there yet, in batches that do not depend on where a run was stopped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from tqdm import tqdm

from flowcore.vae.autoencoder import Autoencoder, load_vae
from flowcore.vae.latent_spec import LatentSpec
from training.data.cache import content_key
from training.data.trajectories import RESULT, SOURCE
from training.encoders import file_identity
from training.files import RunError
from training.keys import key
from training.locks import locked
from training.stop import StopFlag
from training.trajectories.plan import Plan, make_plan
from training.trajectories.store import Record, Store
from training.trajectories.teachers import Maker, Teacher

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True, kw_only=True)
class Sources:
    """Pictures before edits, which a teacher makes of the noise of the records.

    Attributes:
        steps: of the teacher; None = as many as of a record.
        prompts: as many as those of the records; None = the same.
    """

    steps: int | None
    prompts: Sequence[str] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What is to be made.

    Attributes:
        maker: of the pictures; without `vae` a `Teacher`, whose latents belong to their noise.
        prompts: record n has prompt n, from the first again after the last.
        vae: name of the autoencoder that encodes the maker's pictures; None = the teacher's latents are kept.
        sources: what is stored beside each record as the picture before an edit; None = nothing.
    """

    maker: Maker
    prompts: Sequence[str]
    count: int
    seed: int
    batch: int
    dtype: str
    vae: str | None
    sources: Sources | None = None

    def load_vae(self) -> Autoencoder | None:
        """The autoencoder, if it is not the teacher's. Raises: CheckpointError, ConfigError."""
        return load_vae(self.vae) if self.vae else None

    def space(self, vae: Autoencoder | None) -> LatentSpec:
        """The space of what is stored."""
        return vae.spec if vae else cast("Teacher", self.maker).space

    def header(self, vae: Autoencoder | None) -> dict[str, Any]:
        """Provenance, JSON-like: what has to be equal for the records to be equal."""
        space = self.space(vae)
        other = {"vae": self.vae, "vae_revision": file_identity(self.vae)} if self.vae else {}
        return {
            "coupling": "independent" if vae else "teacher",
            **self.maker.facts,
            **other,
            "latents": {
                "space": space.name,
                "channels": space.channels,
                "downscale": space.downscale,
                "mean": list(space.mean),
                "std": list(space.std),
            },
            "size": list(self.maker.size),
            "seed": self.seed,
            "dtype": self.dtype,
            "captions": content_key(*self.prompts),
            "sources": self.sources
            and {
                "steps": self.sources.steps,
                "captions": self.sources.prompts and content_key(*self.sources.prompts),
            },
        }

    def plan(self, tflops: float) -> Plan:
        """What it will take at a speed in 10^12 operations a second."""
        return make_plan(
            count=self.count,
            captions=len({self.prompts[n % len(self.prompts)] for n in range(self.count)}),
            size=self.maker.size,
            space=self.space(self.load_vae()),
            dtype=self.dtype,
            flops=self.maker.flops() + (self.maker.flops(self.sources.steps) if self.sources else 0.0),
            tflops=tflops,
            tensors=2 if self.sources else 1,
        )

    def tensors(self, numbers: Sequence[int], vae: Autoencoder | None) -> list[dict[str, Tensor]]:
        """Latents `c h w`, float32, of records, by their names."""
        made = {RESULT: self._latents(numbers, vae, self.prompts, None)}
        if self.sources:
            prompts = self.sources.prompts or self.prompts
            made[SOURCE] = self._latents(numbers, vae, prompts, self.sources.steps)
        return [{name: tensor[i] for name, tensor in made.items()} for i in range(len(numbers))]

    def _latents(
        self, numbers: Sequence[int], vae: Autoencoder | None, prompts: Sequence[str], steps: int | None
    ) -> Tensor:
        captions, seeds = [_nth(prompts, n) for n in numbers], [self.noise_seed(n) for n in numbers]
        if vae is None:
            return cast("Teacher", self.maker).latents(captions, seeds, steps)
        with torch.inference_mode():
            pictures = self.maker.pictures(captions, seeds, numbers, steps)
            return torch.cat([vae.encode(picture[None]) for picture in pictures])

    def captions(self, number: int) -> dict[str, str]:
        """The caption of a record, and of its source if that has another."""
        told = {"caption": _nth(self.prompts, number)}
        if self.sources and self.sources.prompts:
            told["source_caption"] = _nth(self.sources.prompts, number)
        return told

    def noise_seed(self, number: int) -> int:
        """What the noise of a record is drawn from."""
        return key(self.seed, "trajectory", number)


def make_records(folder: Path, job: Job, stop: StopFlag) -> bool:
    """Fills a folder; False if a stop came first.

    Raises: ConfigError if the folder holds something else; RunError if a write fails, or for latents that are
        not finite.
    """
    with locked(folder, "trajectories", stop):
        vae = job.load_vae()
        store = Store(folder, job.header(vae), job.count)
        missing = set(store.missing())
        with tqdm(
            total=job.count, initial=job.count - len(missing), desc="trajectories", unit="record"
        ) as bar:
            for first in range(0, job.count, job.batch):
                numbers = range(first, min(job.count, first + job.batch))
                wanted = [number for number in numbers if number in missing]
                if not wanted:
                    continue
                if stop:
                    return False
                made = job.tensors(numbers, vae)
                for number in wanted:
                    store.add(number, _record(job, number, made[number - first], is_coupled=vae is None))
                store.pack()
                bar.update(len(wanted))
    return True


def _nth(prompts: Sequence[str], number: int) -> str:
    return prompts[number % len(prompts)]


def _record(job: Job, number: int, tensors: Mapping[str, Tensor], *, is_coupled: bool) -> Record:
    kept = {name: tensor.to(DTYPES[job.dtype]).clone() for name, tensor in tensors.items()}
    facts: dict[str, Any] = dict(job.captions(number))
    if not all(torch.isfinite(tensor).all() for tensor in kept.values()):
        raise RunError(
            f"latents of record {number} ({facts['caption'][:80]!r}) must be finite in {job.dtype}, got "
            "others; store them with --dtype float32, or change --seed or the prompt"
        )
    if is_coupled:
        facts |= {"noise_seed": job.noise_seed(number), "noise_shape": list(tensors[RESULT].shape)}
    return Record(kept, facts)
