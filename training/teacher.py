"""Another model as teacher: a run learns its velocity at the noised samples, instead of the data's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from flowcore.conditioning import Conditioning
from flowcore.errors import ConfigError
from flowcore.models import Architecture
from flowcore.pipeline import Pipeline
from training.data.encoded import EncodedSamples
from training.encoders import ImageEncoder, latent_facts

LATENT_FACTS = ("flowcore.latents_mean", "flowcore.latents_std")
"""What tells latents of one channel count apart."""


class VelocityTeacher:
    """The expected velocity of noised samples, as a trained model knows it.

    That of the data is right in the mean alone, a teacher's for each sample, so fewer of them are enough.
    Source: Hinton et al. 2015, arXiv:1503.02531.
    """

    def __init__(self, pipeline: Pipeline) -> None:
        """Take a model with its text encoder."""
        self.pipeline = pipeline

    @torch.no_grad()
    def __call__(self, z: Tensor, sigma: Tensor, captions: Sequence[str], dropped: Tensor) -> Tensor:
        """The velocity `b c h w`, float32, of latents z `b c h w` at noise levels sigma `b`.

        captions: `b`, empty where they are dropped (`b`).
        """
        pipeline, architecture = self.pipeline, self.pipeline.model.architecture
        cell = pipeline.vae.spec.downscale
        sized = pipeline.settings_type(width=z.shape[-1] * cell, height=z.shape[-2] * cell)
        told = with_null(architecture, pipeline.condition(captions, sized), dropped)
        return pipeline.velocity(z, sigma, told).float()


def load_teacher(
    name: str, image_encoder: ImageEncoder, data: EncodedSamples, device: torch.device
) -> VelocityTeacher:
    """The teacher of a file or a bundled name.

    Raises: CheckpointError if it cannot be read; ConfigError if it needs more than captions, the samples have
        none, or its latents are not theirs.
    """
    pipeline = Pipeline.from_files(name, device=str(device))
    if pipeline.model.architecture.name == "exo":
        raise ConfigError(f"train.teachers must be a model that captions alone tell, got {name} (exo)")
    if any(sample.is_told for sample in data.samples):
        raise ConfigError(
            "train.teachers must be left out with a dataset of kind latents, which has no captions, got "
            f"{name}"
        )
    spec = pipeline.vae.spec
    known = latent_facts(spec, str(pipeline.sources["vae"]))
    if any(image_encoder.facts.get(key) != known[key] for key in LATENT_FACTS):
        own = image_encoder.facts.get("flowcore.latent_spec", "pixels")
        raise ConfigError(
            f"train.teachers must have the latents of encoders.vae ({own}), got {name} with others "
            f"({spec.name}); name models that were trained with that VAE, or leave them out"
        )
    return VelocityTeacher(pipeline)


def with_null(architecture: Architecture, text: Conditioning, dropped: Tensor) -> Conditioning:
    """The conditioning of captions, in the rows `dropped` (`b`) that of a model told nothing."""
    null = architecture.null_text(text)

    def choose(told: Tensor | None, nothing: Tensor | None) -> Tensor | None:
        if told is None or nothing is None:
            return told
        rows = dropped.to(told.device).reshape(-1, *[1] * (told.ndim - 1))
        return torch.where(rows, nothing, told)

    return replace(text, context=choose(text.context, null.context), pooled=choose(text.pooled, null.pooled))
