"""Flow matching: mean squared error of the velocity at a random noise level."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from flowcore.conditioning import Conditioning, cat
from flowcore.flow import StepState, VelocityFn, cfg, interpolate, noise_law, sigma_grid
from flowcore.flow.solvers import euler
from flowcore.layers.attention import find_attention
from flowcore.models import Architecture
from flowcore.ops import Runtime, run_checkpointed, run_plain
from training.config import Sampling, Timesteps
from training.data.encoded import EncodedSamples
from training.data.order import BatchOrder
from training.encoders import CaptionEncoder, ImageEncoder
from training.grid import save_grid
from training.keys import generator
from training.stop import StopFlag

FLOOR = 1e-4
PREVIEW_BATCH = 64
Judge = Callable[[Tensor, Sequence[str]], dict[str, float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """What the objective takes from a run's configuration."""

    seed: int
    batch_size: int
    timesteps: Timesteps
    cond_dropout: float
    sampling: Sampling
    size: tuple[int, int]
    is_checkpointed: bool = False
    attention: str = "auto"


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
        recipe: Recipe,
        *,
        device: torch.device,
        judge: Judge | None = None,
    ) -> None:
        """Groups the samples into buckets; `judge` measures previews."""
        self.module = module.to(device)
        self.architecture, self.data, self.recipe = architecture, data, recipe
        self.device, self.judge = device, judge
        self.image_encoder, self.caption_encoder = image_encoder, caption_encoder
        self.groups: list[list[int]] = [
            [n for n, b in enumerate(data.buckets) if b == bucket] for bucket in sorted(set(data.buckets))
        ]
        self.order = BatchOrder(recipe.seed, tuple(map(len, self.groups)), recipe.batch_size)
        times = recipe.timesteps
        parameters = {"mean": times.mean, "std": times.std} if times.law == "logit_normal" else {}
        self.runtime = Runtime(
            attention=find_attention(recipe.attention),
            run_block=run_checkpointed if recipe.is_checkpointed else run_plain,
        )
        self.law = noise_law(times.law, shift=times.shift, **parameters)

    def samples(self, step: int) -> list[int]:
        """Numbers of the samples in the global batch of a step."""
        bucket, positions = self.order.batch(step)
        return [self.groups[bucket][p] for p in positions]

    def batch_keys(self, step: int) -> tuple[str, list[str]]:
        """Size of the bucket and keys of the samples of a step's global batch."""
        numbers = self.samples(step)
        bucket = self.data.buckets[numbers[0]]
        return f"{bucket.width}x{bucket.height}", [self.data.samples[n].key for n in numbers]

    def loss(self, step: int, part: slice) -> Tensor:
        """Mean squared velocity error of samples `part` of a step's batch, float32."""
        numbers = self.samples(step)
        clean = self.data.latents(numbers[part])
        uniforms, noises, captions, dropped = [], [], [], []
        for position, number in list(enumerate(numbers))[part]:
            draw = generator(self.recipe.seed, "sample", step, position)
            level, drop = torch.rand(2, generator=draw, dtype=torch.float64).tolist()
            uniforms.append(level)
            dropped.append(drop < self.recipe.cond_dropout)
            captions.append("" if dropped[-1] else self.data.samples[number].caption)
            noises.append(self.data.noise(number, draw))
        quantiles = self.law.quantile(torch.tensor(uniforms, dtype=torch.float64))
        sigma = quantiles.float().clamp(FLOOR, 1 - FLOOR).to(self.device)
        sample = interpolate(clean.to(self.device), torch.stack(noises).to(self.device), sigma)
        text = self._with_null(self.data.conditioning(captions), torch.tensor(dropped))
        conditioning = self.with_size(text, clean).to(self.device)
        routing = generator(self.recipe.seed, "routing", step, part.start)
        predicted = self.architecture.velocity(
            self.module.forward, sample.noised, sigma, conditioning, generator=routing, runtime=self.runtime
        )
        return functional.mse_loss(predicted.float(), sample.velocity)

    def _with_null(self, text: Conditioning, dropped: Tensor) -> Conditioning:
        """The conditioning of captions, in the rows `dropped` (`b`) that of a model told nothing."""
        null = self.architecture.null_text(text)

        def choose(told: Tensor | None, nothing: Tensor | None) -> Tensor | None:
            if told is None or nothing is None:
                return told
            return torch.where(dropped.reshape(-1, *[1] * (told.ndim - 1)), nothing, told)

        return replace(
            text, context=choose(text.context, null.context), pooled=choose(text.pooled, null.pooled)
        )

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
        shape = (self.image_encoder.channels, height // 8, width // 8)
        noise = torch.stack(
            [
                torch.randn(shape, generator=generator(sampling.seed, "preview", first + i))
                for i in range(len(prompts))
            ]
        ).to(self.device)
        told, empty = (self.caption_encoder.encode(texts) for texts in ([*prompts], [""] * len(prompts)))
        both = cat([told, self.architecture.null_text(empty)])
        conditioning = self.with_size(both, noise.repeat(2, 1, 1, 1)).to(self.device)
        velocity = self._guided(conditioning, sampling.cfg)

        def check(state: StepState) -> None:
            del state
            stop.check()

        latents = euler(velocity, noise, sigma_grid(sampling.steps), callback=check)
        return torch.cat([self.image_encoder.decode(part) for part in torch.split(latents, 16)]).cpu()

    def _guided(self, conditioning: Conditioning, scale: float) -> VelocityFn:
        """Guided velocity from one batch of conditional and unconditional rows."""

        def pair(x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
            result = self.architecture.velocity(
                self.module.forward, x.repeat(2, 1, 1, 1), sigma.repeat(2), conditioning
            )
            conditional, unconditional = result.chunk(2)
            return conditional, unconditional

        def velocity(x: Tensor, sigma: Tensor) -> Tensor:
            return cfg(*pair(x, sigma), x, sigma, scale)

        return velocity
