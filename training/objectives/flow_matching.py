"""Flow matching: mean squared error of the velocity at a random noise level."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from flowcore.conditioning import Conditioning, cat
from flowcore.flow import (
    PathSample,
    StepState,
    VelocityFn,
    cfg,
    interpolate,
    noise_law,
    shift_sigma,
    sigma_grid,
)
from flowcore.flow.solvers import euler
from flowcore.layers.attention import find_attention
from flowcore.models import Architecture
from flowcore.ops import Runtime, run_checkpointed, run_plain
from training.config import Sampling
from training.data.buckets import Bucket
from training.data.encoded import EncodedSamples
from training.data.order import BatchOrder
from training.data.sample import LATENTS, SOURCE_LATENTS
from training.encoders import CaptionEncoder, ImageEncoder
from training.grid import save_grid
from training.keys import generator
from training.stop import StopFlag
from training.teacher import load_teacher, with_null
from training.train_table import ExoTraining, Timesteps

FLOOR = 1e-4
NODES = 20
"""Noise levels of the law linear20."""
PREVIEW_BATCH = 64
Judge = Callable[[Tensor, Sequence[str]], dict[str, float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """What the objective takes from the configuration of a run's stage, which begins at first_step.

    sampling_shift: of the noise levels of samples. teachers: whose velocity is learned, none = the data's.
    """

    seed: int
    batch_size: int
    timesteps: Timesteps
    cond_dropout: float
    sampling: Sampling
    size: tuple[int, int]
    is_checkpointed: bool = False
    attention: str = "auto"
    first_step: int = 0
    sampling_shift: float = 1.0
    teachers: tuple[str, ...] = ()
    exo: ExoTraining = field(default_factory=ExoTraining)

    def runtime(self) -> Runtime:
        """How blocks and attention are computed."""
        run_block = run_checkpointed if self.is_checkpointed else run_plain
        return Runtime(attention=find_attention(self.attention), run_block=run_block)

    def levels(self, uniforms: Tensor) -> Tensor:
        """Noise levels of uniform numbers in [0, 1), of their shape and dtype."""
        times = self.timesteps
        if times.law == "linear20":
            return shift_sigma((uniforms * NODES).floor() / (NODES - 1), times.shift)
        parameters = {"mean": times.mean, "std": times.std} if times.law == "logit_normal" else {}
        return noise_law(times.law, shift=times.shift, **parameters).quantile(uniforms)


@dataclass(frozen=True, slots=True, kw_only=True)
class Draw:
    """Samples of a batch with what chance gives them: a noise level, and whether the caption is dropped.

    clean `b c h w` on the device; dropped `b`; sigma `b`.
    """

    step: int
    first: int
    numbers: list[int]
    captions: list[str]
    dropped: Tensor
    clean: Tensor
    sample: PathSample
    sigma: Tensor


class FlowMatchingObjective:
    """Velocity regression of one architecture's model on encoded samples.

    Time, noise and caption dropout of a sample depend on (seed, step, position in the global batch) alone.
    Source: Lipman et al. 2022, arXiv:2210.02747; Esser et al. 2024, arXiv:2403.03206.
    """

    def __init__(
        self,
        module: nn.Module,
        architecture: Architecture,
        data: EncodedSamples,
        image_encoder: ImageEncoder,
        caption_encoder: CaptionEncoder,
        recipes: Sequence[Recipe],
        *,
        device: torch.device,
        judge: Judge | None = None,
    ) -> None:
        """Groups the samples into buckets; recipes: of the run's stages; `judge` measures previews.

        Raises: CheckpointError, ConfigError if a teacher cannot be used.
        """
        self.module = module.to(device)
        self.architecture, self.data, self.recipes = architecture, data, recipes
        self.recipe = recipes[0]
        self.device, self.judge = device, judge
        self.image_encoder, self.caption_encoder = image_encoder, caption_encoder
        self.teachers = {
            name: load_teacher(name, image_encoder, data, device)
            for name in dict.fromkeys(name for recipe in recipes for name in recipe.teachers)
        }
        kinds = [self.kind_of(number) for number in range(len(data.samples))]
        self.groups: list[list[int]] = [
            [number for number, k in enumerate(kinds) if k == kind] for kind in sorted(set(kinds))
        ]

    def kind_of(self, number: int) -> tuple[Bucket, int]:
        """What the samples of one batch have in common."""
        return self.data.buckets[number], 0

    def recipe_at(self, step: int) -> Recipe:
        """The recipe of the stage that a step lies in."""
        return next(recipe for recipe in reversed(self.recipes) if recipe.first_step <= step)

    def samples(self, step: int) -> list[int]:
        """Numbers of the samples in the global batch of a step."""
        groups = self.groups_at(step)
        order = BatchOrder(self.recipe.seed, tuple(map(len, groups)), self.recipe_at(step).batch_size)
        number, positions = order.batch(step)
        return [groups[number][p] for p in positions]

    def groups_at(self, step: int) -> list[list[int]]:  # noqa: ARG002 - of the same data in all steps
        """Numbers of the samples that a step may draw from, those together that one batch can hold."""
        return self.groups

    def batch_keys(self, step: int) -> tuple[str, list[str]]:
        """Size of the bucket and keys of the samples of a step's global batch."""
        numbers = self.samples(step)
        bucket = self.data.buckets[numbers[0]]
        return f"{bucket.width}x{bucket.height}", [self.data.samples[n].key for n in numbers]

    def loss(self, step: int, part: slice) -> Tensor:
        """Mean squared velocity error of samples `part` of a step's batch, float32."""
        draw = self.draw(step, part)
        predicted = self.predict(draw, self.conditioning(draw))
        return functional.mse_loss(predicted.float(), self.target(draw))

    def target(self, draw: Draw) -> Tensor:
        """The velocity `b c h w` that is learned, float32: the data's, or the mean of the teachers'."""
        names = self.recipe_at(draw.step).teachers
        if not names:
            return draw.sample.velocity
        told = (draw.sample.noised, draw.sigma, draw.captions, draw.dropped)
        return torch.stack([self.teachers[name](*told) for name in names]).mean(dim=0)

    def draw(self, step: int, part: slice) -> Draw:
        """Samples `part` of a step's batch, noised."""
        recipe, numbers = self.recipe_at(step), self.samples(step)
        clean = self.data.latents(numbers[part])
        uniforms, noises, captions, dropped = [], [], [], []
        for position, number in list(enumerate(numbers))[part]:
            chance = generator(recipe.seed, "sample", step, position)
            level, drop = torch.rand(2, generator=chance, dtype=torch.float64).tolist()
            uniforms.append(level)
            dropped.append(drop < recipe.cond_dropout)
            captions.append("" if dropped[-1] else self.data.samples[number].caption)
            noises.append(self.data.noise(number, chance))
        quantiles = recipe.levels(torch.tensor(uniforms, dtype=torch.float64))
        sigma = quantiles.float().clamp(FLOOR, 1 - FLOOR).to(self.device)
        clean = clean.to(self.device)
        return Draw(
            step=step,
            first=part.start,
            numbers=numbers[part],
            captions=captions,
            dropped=torch.tensor(dropped),
            clean=clean,
            sample=interpolate(clean, torch.stack(noises).to(self.device), sigma),
            sigma=sigma,
        )

    def conditioning(self, draw: Draw) -> Conditioning:
        """What the model is told of samples, on the device."""
        text = self.text_of(draw.numbers, draw.dropped.tolist())
        text = with_null(self.architecture, text, draw.dropped)
        return self.with_size(text, draw.clean).to(self.device)

    def text_of(self, numbers: Sequence[int], dropped: Sequence[bool]) -> Conditioning:
        """Captions of samples as the model reads them, the empty one where they are dropped."""
        return self.data.conditioning(numbers, dropped)

    def batch_tensors(self, step: int) -> dict[str, Tensor]:
        """Data and conditions of a step's global batch, with every caption; no noise and no times.

        latents `b c h w`; of edits source_latents, too; context `b m d`, context_mask `b m`, pooled `b k`,
        and pictures as the model takes them, where the model is told so.
        """
        numbers = self.samples(step)
        told = self.text_of(numbers, [False] * len(numbers))
        parts = {"context": told.context, "context_mask": told.context_mask, "pooled": told.pooled}
        found = {LATENTS: self.data.latents(numbers), **told.extras}
        if self.data.samples[numbers[0]].is_edit:
            found[SOURCE_LATENTS] = self.data.source_latents(numbers)
        return found | {name: part for name, part in parts.items() if part is not None}

    def predict(self, draw: Draw, conditioning: Conditioning) -> Tensor:
        """The velocity `b c h w` of noised samples."""
        recipe = self.recipe_at(draw.step)
        return self.architecture.velocity(
            self.module,
            draw.sample.noised,
            draw.sigma,
            conditioning,
            generator=generator(recipe.seed, "routing", draw.step, draw.first),
            runtime=recipe.runtime(),
        )

    def errors(self, numbers: Sequence[int], captions: Sequence[str], level: float) -> Tensor:
        """Squared velocity error `b` of samples told other captions, at a noise level and their own noise."""
        clean = self.data.latents(numbers).to(self.device)
        noises = [self.data.noise(number, generator(self.recipe.seed, "probe", number)) for number in numbers]
        sigma = torch.full((len(numbers),), level, device=self.device)
        draw = Draw(
            step=self.recipes[-1].first_step,
            first=0,
            numbers=list(numbers),
            captions=list(captions),
            dropped=torch.zeros(len(numbers), dtype=torch.bool),
            clean=clean,
            sample=interpolate(clean, torch.stack(noises).to(self.device), sigma),
            sigma=sigma,
        )
        predicted = self.predict(draw, self.told(draw))
        return (predicted.float() - draw.sample.velocity).square().mean(dim=(1, 2, 3))

    def told(self, draw: Draw) -> Conditioning:
        """What the model is told of samples with captions that are not in the data, on the device."""
        text = self.caption_encoder.encode(draw.captions)
        return self.with_size(text, draw.clean).to(self.device)

    def with_size(self, conditioning: Conditioning, latents: Tensor) -> Conditioning:
        """The conditioning with what the architecture is told of the picture's size."""
        extras = self.architecture.size_extras(self.module.config, latents.shape[-1], latents.shape[-2])
        return replace(conditioning, extras=extras).expand(latents.shape[0]) if extras else conditioning

    def preview(self, folder: Path, step: int, stop: StopFlag) -> dict[str, float]:
        """A grid of samples of the configured prompts, and what the judge says of them."""
        prompts = list(self.recipe.sampling.prompts) or [s.caption for s in self.data.samples[:8]]
        images = torch.cat(
            [
                self.sample(prompts[i : i + PREVIEW_BATCH], stop, i)
                for i in range(0, len(prompts), PREVIEW_BATCH)
            ]
        )
        columns = min(8, math.isqrt(len(images) - 1) + 1)
        save_grid(images[: columns * columns], folder / f"step-{step:08d}.png", columns)
        return self.judge(images, prompts) if self.judge else {}

    def sample(self, prompts: Sequence[str], stop: StopFlag, first: int = 0) -> Tensor:
        """Images `b 3 y x` in [-1, 1] of prompts, by Euler with the configured guidance.

        Noise of prompt i depends on the sampling seed and `first` + i.
        """
        sampling = self.recipe.sampling
        width, height = self.recipe.size
        cell = self.image_encoder.downscale
        shape = (self.image_encoder.channels, height // cell, width // cell)
        noise = torch.stack(
            [
                torch.randn(shape, generator=generator(sampling.seed, "preview", first + i))
                for i in range(len(prompts))
            ]
        ).to(self.device)
        told, empty = (self.caption_encoder.encode(texts) for texts in ([*prompts], [""] * len(prompts)))
        both = cat([told, self.architecture.null_text(empty)])
        conditioning = self.with_size(both, noise.repeat(2, 1, 1, 1)).to(self.device)
        velocity = self._guided(conditioning, sampling.cfg, self.sampling_options(conditioning, noise))

        def check(state: StepState) -> None:
            del state
            stop.check()

        latents = euler(
            velocity, noise, sigma_grid(sampling.steps, self.recipe.sampling_shift), callback=check
        )
        return torch.cat([self.image_encoder.decode(part) for part in torch.split(latents, 16)]).cpu()

    def sampling_options(self, conditioning: Conditioning, noise: Tensor) -> dict[str, Any]:  # noqa: ARG002
        """What the architecture's velocity is given in every step of sampling, besides the conditions."""
        return {}

    def _guided(self, conditioning: Conditioning, scale: float, options: dict[str, Any]) -> VelocityFn:
        """Guided velocity from one batch of conditional and unconditional rows."""

        def pair(x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
            result = self.architecture.velocity(
                self.module, x.repeat(2, 1, 1, 1), sigma.repeat(2), conditioning, **options
            )
            conditional, unconditional = result.chunk(2)
            return conditional, unconditional

        def velocity(x: Tensor, sigma: Tensor) -> Tensor:
            return cfg(*pair(x, sigma), x, sigma, scale)

        return velocity
