"""Losses of SingleStreamDiT's training: on velocities, on spectra of clean estimates, and against a teacher.

Pure functions in the project's convention: sigma 1 = noise, velocity = noise - clean. Means are over all
elements. Source: Particle1904/SingleStreamDiT_T5Gemma2, losses.py at 01b01b7, train.py at 333d3fa.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional

from flowcore.errors import ConfigError, ShapeError
from flowcore.flow import VelocityFn, interpolate, velocity_to_denoised

VelocityLoss = Literal["mse", "l1", "huber"]

HUBER_DELTA = 0.1
AMPLITUDE_SIGMA, COHERENCE_SIGMA = 0.5, 0.7
"""Noise levels from which on the losses on spectra are 0."""
OFFSET = 0.05
"""Published strength of offset noise."""


def add_offset(noise: Tensor, offsets: Tensor, strength: float = OFFSET) -> Tensor:
    """Noise `b c h w` with each channel shifted as a whole, by strength times offsets `b c 1 1`.

    The shifted noise is part of the target, too; sampling starts from plain noise.
    """
    return torch.add(noise, offsets, alpha=strength)


def velocity_loss(kind: VelocityLoss, predicted: Tensor, target: Tensor) -> Tensor:
    """Mean error of a velocity: `mse`, `l1`, or `huber`, which is linear from 0.1 on.

    Raises: ConfigError for another kind.
    """
    if kind == "mse":
        return functional.mse_loss(predicted, target)
    if kind == "l1":
        return functional.l1_loss(predicted, target)
    if kind == "huber":
        return functional.huber_loss(predicted, target, delta=HUBER_DELTA)
    raise ConfigError(f"the velocity loss must be one of {', '.join(get_args(VelocityLoss))}, got {kind!r}")


def amplitude_loss(denoised: Tensor, clean: Tensor, sigma: Tensor) -> Tensor:
    """Mean squared difference of the amplitudes of two spectra, times (1 - sigma)^2, below sigma 0.5.

    The reference calls it FAL. Shapes: denoised and clean `b c h w`, sigma `b`.
    """
    first, second = _spectrum(denoised), _spectrum(clean)
    weight = torch.where(sigma < AMPLITUDE_SIGMA, (1 - sigma).square(), 0.0)
    return (weight[:, None, None, None] * (first.abs() - second.abs()).square()).mean()


def coherence_loss(denoised: Tensor, clean: Tensor, sigma: Tensor) -> Tensor:
    """One minus the cosine between two spectra, phases included, below sigma 0.7; mean over the batch.

    The reference calls it FCL. Shapes: denoised and clean `b c h w`, sigma `b`.
    """
    first, second = _spectrum(denoised).flatten(1), _spectrum(clean).flatten(1)
    product = (second * first.conj()).real.sum(1)
    power = first.abs().square().sum(1) * second.abs().square().sum(1)
    cosine = (product / (power.sqrt() + 1e-6)).clamp(-1, 1)
    return torch.where(sigma < COHERENCE_SIGMA, 1 - cosine, 0.0).mean()


@dataclass(frozen=True, slots=True, kw_only=True)
class SelfEvaluation:
    """What a model is to match when its average teaches it.

    Shapes: target `b c h w`; weight of the teacher's part `b`; sigma `b` at which the teacher was asked.
    """

    target: Tensor
    weight: Tensor
    sigma: Tensor


@torch.no_grad()
def self_evaluation(
    denoised: Tensor, clean: Tensor, noise: Tensor, sigma: Tensor, share: Tensor, teacher: VelocityFn
) -> SelfEvaluation:
    """Target for clean estimates: the data, moved by what the teacher says of the estimate, at its length.

    The loss is the mean squared error of the estimate to the target; no gradient passes through the target.

    Args:
        denoised: clean estimates at sigma.
        clean: the data.
        noise: drawn for this purpose.
        sigma: level of the estimates, `b`.
        share: uniform numbers `b`; the teacher is asked at sigma * (1 - share).
        teacher: velocity of the averaged weights, guided.
    """
    later = sigma * (1 - share)
    noised = interpolate(denoised, noise, later).noised
    better = velocity_to_denoised(teacher(noised, later), noised, later)
    moved = denoised + (better - noised)
    weight = (_noise_to_data(sigma) - _noise_to_data(later)).clamp(0, 10)
    target = clean + weight[:, None, None, None] * moved
    target = target * (_norm(clean) / (_norm(target) + 1e-6))
    return SelfEvaluation(target=target, weight=weight, sigma=later)


@dataclass(frozen=True, slots=True, kw_only=True)
class LossMix:
    """Weights of the parts of a loss; HEAD's are the defaults, but for self-evaluation, which is off."""

    velocity: VelocityLoss = "mse"
    amplitude: float = 0.5
    coherence: float = 0.1
    self_evaluation: float = 0.0


def mixed_loss(
    mix: LossMix,
    predicted: Tensor,
    clean: Tensor,
    noise: Tensor,
    sigma: Tensor,
    estimate_target: Tensor | None = None,
) -> Tensor:
    """Sum of the parts for predicted velocities `b c h w` at levels sigma `b`, float32.

    estimate_target: of self-evaluation. The clean latents themselves give what HEAD's code computes, whose
    teacher has weight 0 everywhere.
    Raises: ConfigError for an unknown velocity loss; ShapeError if self-evaluation lacks its target.
    """
    sample = interpolate(clean, noise, sigma)
    predicted = predicted.float()
    total = velocity_loss(mix.velocity, predicted, sample.velocity)
    if not (mix.amplitude or mix.coherence or mix.self_evaluation):
        return total
    denoised = velocity_to_denoised(predicted, sample.noised, sigma)
    if mix.amplitude:
        total = total + mix.amplitude * amplitude_loss(denoised, clean, sigma)
    if mix.coherence:
        total = total + mix.coherence * coherence_loss(denoised, clean, sigma)
    if mix.self_evaluation:
        if estimate_target is None:
            raise ShapeError("estimate_target must be given with self_evaluation above 0, got None")
        total = total + mix.self_evaluation * functional.mse_loss(denoised, estimate_target)
    return total


def _spectrum(latents: Tensor) -> Tensor:
    """Half spectrum `b c h f` of latents `b c h w`, complex64."""
    spectrum: Tensor = torch.fft.rfft2(latents.float(), norm="ortho")
    return spectrum


def _noise_to_data(sigma: Tensor) -> Tensor:
    return sigma / (1 - sigma + 1e-4)


def _norm(latents: Tensor) -> Tensor:
    """Length of each sample, `b 1 1 1`."""
    norm: Tensor = torch.linalg.vector_norm(latents, dim=(1, 2, 3), keepdim=True)
    return norm
