"""Who makes what is stored: a model of this project, or a folder of images that are there already."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from flowcore.errors import ConfigError
from flowcore.pipeline import Pipeline
from flowcore.settings import Settings
from flowcore.vae.latent_spec import LatentSpec
from training.config import Data, Dataset
from training.data.buckets import Bucket
from training.data.cache import content_key
from training.data.folder import scan
from training.data.images import load_image
from training.encoders import file_identity
from training.files import sha256
from training.stop import StopFlag


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What is asked of a teacher; sides in pixels; None = the teacher's own values."""

    width: int | None = None
    height: int | None = None
    steps: int = 20
    guidance: float | None = None
    negative: str = ""
    device: str = "auto"
    dtype: str = "auto"


class Maker(Protocol):
    """Captions to pictures.

    size: width and height in pixels. steps of its methods: other than those that were asked for.
    """

    size: tuple[int, int]

    @property
    def facts(self) -> Mapping[str, Any]:
        """Where the pictures come from, JSON-like."""

    def flops(self, steps: int | None = None) -> float:
        """Floating-point operations that a picture costs, without encoders."""

    def pictures(
        self, captions: Sequence[str], seeds: Sequence[int], numbers: Sequence[int], steps: int | None = None
    ) -> Tensor:
        """Pictures `b 3 y x` in [-1, 1] for records of these numbers."""


class Teacher(Maker, Protocol):
    """Captions and noise to latents of the same space."""

    @property
    def space(self) -> LatentSpec:
        """The latent space."""

    def latents(self, captions: Sequence[str], seeds: Sequence[int], steps: int | None = None) -> Tensor:
        """Latents `b c h w`, float32, to which the noise of the seeds (`draw_start`) is led."""


class FlowTeacher:
    """A model of this project, through its own sampler."""

    def __init__(self, name: str, request: Request) -> None:
        """Raises: CheckpointError, ConfigError if a file or an option cannot be used."""
        self.pipeline = Pipeline.from_files(name, device=request.device, dtype=request.dtype)
        kind = self.pipeline.settings_type
        guidance = kind().cfg_scale if request.guidance is None else request.guidance
        self.settings = self.pipeline.sized(
            kind(
                width=request.width,
                height=request.height,
                num_steps=request.steps,
                cfg_scale=guidance,
                negative_prompt=request.negative,
            )
        )
        self.space = self.pipeline.vae.spec
        self.size = (self.settings.width or 0, self.settings.height or 0)
        self.facts = {
            "teacher": name,
            "revision": file_identity(name),
            "vae": self.pipeline.sources["vae"],
            "steps": request.steps,
            "guidance": guidance,
            "negative": request.negative,
            "schedule": f"{self.settings.solver}, shift {self.settings.shift}",
        }

    def flops(self, steps: int | None = None) -> float:
        """As `Maker`; counted in one step."""
        cell = self.space.downscale
        shape = (1, self.space.channels, self.size[1] // cell, self.size[0] // cell)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            velocity = self.pipeline.guided_velocity([""], self.settings)
            velocity(torch.zeros(shape, device=self.pipeline.device), torch.ones(1))
        return float(counter.get_total_flops() * self._settings(steps).num_steps)

    def latents(self, captions: Sequence[str], seeds: Sequence[int], steps: int | None = None) -> Tensor:
        """As `Teacher`."""
        return self.pipeline.sample(captions, seeds, self._settings(steps))

    @torch.inference_mode()
    def pictures(
        self, captions: Sequence[str], seeds: Sequence[int], numbers: Sequence[int], steps: int | None = None
    ) -> Tensor:
        """As `Maker`."""
        del numbers
        return torch.cat(
            [self.pipeline.vae.decode(one[None]) for one in self.latents(captions, seeds, steps)]
        )

    def _settings(self, steps: int | None) -> Settings:
        return replace(self.settings, num_steps=steps) if steps else self.settings


class ImageFolder:
    """Images with captions; record n is image n, whatever noise is drawn for it."""

    def __init__(self, folder: Path, request: Request) -> None:
        """Raises: DataError if the folder or a file in it cannot be used; ConfigError without a size."""
        if request.width is None or request.height is None:
            raise ConfigError("--width and --height must be given with --images, got one or none of them")
        self.samples, _ = scan([Dataset.model_validate({"path": str(folder)})], Data(), StopFlag())
        self.size = (request.width, request.height)
        self.captions = [sample.caption for sample in self.samples]
        contents = [f"{sample.key} {sha256(sample.path)}" for sample in self.samples]
        self.facts = {"teacher": str(folder), "revision": content_key(*contents, *self.captions)}

    def flops(self, steps: int | None = None) -> float:
        """As `Maker`: none."""
        del steps
        return 0.0

    def pictures(
        self, captions: Sequence[str], seeds: Sequence[int], numbers: Sequence[int], steps: int | None = None
    ) -> Tensor:
        """As `Maker`."""
        del captions, seeds, steps
        bucket = Bucket(*self.size)
        return torch.stack([load_image(self.samples[number].path, bucket) for number in numbers])
