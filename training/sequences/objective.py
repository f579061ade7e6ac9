"""Flow matching between sequences: mean squared error of the velocity on the way to the data's tokens."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from flowcore.flow import StepState, interpolate, noise_law
from flowcore.flux import SpacePair, conditioning_of, transport
from flowcore.models.flux import Flux, velocity
from flowcore.ops import DEFAULT_RUNTIME, Runtime, run_checkpointed
from training.files import write_atomic
from training.keys import generator
from training.sequences.config import SequenceConfig
from training.sequences.tasks import PairSource
from training.stop import StopFlag

FLOOR = 1e-4


@dataclass(frozen=True, slots=True)
class Draws:
    """What chance decides of a global batch; shapes: sigma `b`, is_dropped `b 1 1`, noise `b n c`."""

    sigma: Tensor
    is_dropped: Tensor
    noise: Tensor


class SequenceObjective:
    """Velocity regression of a Flux on pairs of sequences.

    Chance depends on the seed and the step alone. Source: flux.md 7.2, after Souymodip/flux_core.
    """

    def __init__(
        self,
        module: Flux,
        pairs: PairSource,
        spaces: SpacePair,
        config: SequenceConfig,
        *,
        device: torch.device,
    ) -> None:
        """Puts the module on the device."""
        self.module: nn.Module = module.to(device)
        self.flux = module
        self.pairs, self.spaces, self.config, self.device = pairs, spaces, config, device
        self.law = noise_law("beta", alpha=config.times.alpha, beta=config.times.beta)
        is_checkpointed = config.train.gradient_checkpointing
        self.runtime = Runtime(run_block=run_checkpointed) if is_checkpointed else DEFAULT_RUNTIME

    def batch_keys(self, step: int) -> tuple[str, list[str]]:
        """One bucket for all, and the pairs of a step's global batch."""
        return "pairs", self.pairs.keys(step)

    def loss(self, step: int, part: slice) -> Tensor:
        """Mean squared velocity error of pairs `part` of a step's batch, float32."""
        batch = self.pairs.batch(step).part(part)
        clean = self.spaces.encode_data(batch.data).tokens
        draws = self._draw(step, clean.shape[1:])
        noise = draws.noise[part] if batch.source is None else self.spaces.encode_data(batch.source).tokens
        sigma = draws.sigma[part].to(self.device)
        sample = interpolate(_columns(clean).to(self.device), _columns(noise).to(self.device), sigma)
        given = conditioning_of(self.spaces, batch.condition, is_dropped=draws.is_dropped[part])
        predicted = velocity(
            self.module.forward, sample.noised, sigma, given.to(self.device), runtime=self.runtime
        )
        return functional.mse_loss(predicted.float(), sample.velocity)

    def _draw(self, step: int, shape: torch.Size) -> Draws:
        """Levels, dropped conditions and noise of a whole global batch, so that its parts never matter."""
        draw = generator(self.config.seed, "draws", step)
        count = self.config.train.batch_size
        uniform, drop = torch.rand(2, count, generator=draw, dtype=torch.float64)
        return Draws(
            sigma=self.law.quantile(uniform).float().clamp(FLOOR, 1 - FLOOR),
            is_dropped=(drop < self.config.train.cond_dropout)[:, None, None],
            noise=torch.randn(count, *shape, generator=draw),
        )

    def preview(self, folder: Path, step: int, stop: StopFlag) -> dict[str, float]:
        """Measurements of samples for the held-out conditions, written as JSON, too."""
        values = self.score(stop)
        write_atomic(folder / f"step-{step:08d}.json", json.dumps(values, indent=1) + "\n")
        return values

    def score(self, stop: StopFlag) -> dict[str, float]:
        """Measurements of samples for the held-out conditions."""

        def check(state: StepState) -> None:
            del state
            stop.check()

        held_out, sampling = self.pairs.held_out, self.config.sampling
        made = transport(
            self.flux,
            held_out.condition,
            space=self.spaces,
            source=held_out.source,
            steps=sampling.steps,
            cfg_scale=sampling.cfg,
            seed=sampling.seed,
            callback=check,
        )
        return self.pairs.measure(made.cpu(), held_out)


def _columns(tokens: Tensor) -> Tensor:
    """Tokens as the columns of latents."""
    return rearrange(tokens, "b n c -> b c n")
