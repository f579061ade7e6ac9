"""Losses of TinyFlux with its teachers, and what is computed from the teachers' outputs: pure functions.

Lune's teacher gives one vector a prompt and time, Sol's gives attention maps, of which three statistics and a
map of importance remain. Times are the data times of TinyFlux: 0 = noise, 1 = data.
Source: AbstractEyes/tiny-flux, trainer and zoo of version 4.2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final, Literal, get_args

import torch
from einops import rearrange, reduce
from torch import Tensor
from torch.nn import functional

from flowcore.errors import ConfigError

LuneMode = Literal["cosine", "huber", "soft", "hard"]
BUCKETS: Final = tuple((2 * index + 1) / 20 for index in range(10))
"""Times at which the teachers' features are stored: 0.05, 0.15, ..., 0.95."""

_SOFTENING = 10.0
_SMALL = 1e-6


def huber(error: Tensor, delta: float) -> Tensor:
    """Half the square of errors up to delta, a straight line beyond; same shape."""
    size = error.abs()
    quadratic = size.clamp_max(delta)
    return 0.5 * quadratic**2 + delta * (size - quadratic)


def velocity_loss(
    predicted: Tensor,
    target: Tensor,
    *,
    huber_delta: float | None = None,
    importance: Tensor | None = None,
    mask: Tensor | None = None,
    mask_weights: tuple[float, float] = (2.0, 0.5),
    weights: Tensor | None = None,
) -> Tensor:
    """Mean error of the velocity, a float32 number.

    Args:
        predicted: `b c h w`, in either direction of time.
        target: likewise.
        huber_delta: use Huber's loss; None = the square.
        importance: maps `b s s` by which cells are weighted, each brought to the mean 1.
        mask: `b h w` in [0, 1], 1 = foreground.
        mask_weights: of foreground and background.
        weights: of the samples `b`, such as `flowcore.flow.loss_weights.min_snr`.
    """
    error = predicted.float() - target.float()
    losses = error**2 if huber_delta is None else huber(error, huber_delta)
    if importance is not None:
        grid = functional.interpolate(importance[:, None].float(), error.shape[-2:], mode="bilinear")
        losses = losses * (grid / (grid.mean(dim=(2, 3), keepdim=True) + _SMALL))
    if mask is not None:
        foreground, background = mask_weights
        share = mask[:, None].float()
        losses = losses * (share * foreground + (1 - share) * background)
    samples = reduce(losses, "b c h w -> b", "mean")
    return (samples if weights is None else samples * weights).mean()


def lune_loss(
    predicted: Tensor,
    target: Tensor,
    mode: LuneMode = "cosine",
    *,
    huber_delta: float = 0.1,
    present: Tensor | None = None,
) -> Tensor:
    """Distance of Lune's prediction from its teacher's features, a float32 number.

    Shapes: predicted and target `b k`; present `b` boolean, which samples have a teacher, None = all.

    Raises:
        ConfigError: the mode is unknown.
    """
    guess = predicted.float()
    truth = _filled(target.float(), guess, present)
    if mode == "cosine":
        samples = 1 - functional.cosine_similarity(guess, truth, dim=-1)
    elif mode == "huber":
        samples = huber(guess - truth, huber_delta).mean(dim=-1)
    elif mode in ("soft", "hard"):
        samples = ((guess - truth) / (_SOFTENING if mode == "soft" else 1.0)).square().mean(dim=-1)
    else:
        raise ConfigError(f"lune mode must be one of {', '.join(get_args(LuneMode))}, got {mode!r}")
    return _mean_of(samples, present)


def sol_loss(
    predicted: tuple[Tensor, Tensor],
    target: tuple[Tensor, Tensor],
    *,
    part_weights: tuple[float, float] = (1.0, 1.0),
    present: Tensor | None = None,
) -> Tensor:
    """Squared distance of Sol's predictions from its teacher's values, a float32 number.

    Shapes: statistics `b 3` and maps `b s s`, in pairs as part_weights; present as in `lune_loss`.
    """
    losses = [
        weight * (guess.float() - _filled(truth.float(), guess, present)).square().flatten(1).mean(dim=1)
        for weight, guess, truth in zip(part_weights, predicted, target, strict=True)
    ]
    return _mean_of(losses[0] + losses[1], present)


def _filled(target: Tensor, predicted: Tensor, present: Tensor | None) -> Tensor:
    """The target, with the prediction in the place of what is absent, which may hold anything."""
    if present is None:
        return target
    return torch.where(present.reshape(-1, *[1] * (target.ndim - 1)), target, predicted.detach().float())


def _mean_of(samples: Tensor, present: Tensor | None) -> Tensor:
    """The mean over the samples that are there; 0 without any."""
    if present is None:
        return samples.mean()
    return torch.where(present, samples, 0.0).sum() / present.sum().clamp_min(1)


def ramp(weight: float, step: int, warmup_steps: int) -> float:
    """Weight of a loss at a step, risen in a straight line from 0 at step 0."""
    return weight * min(step / warmup_steps, 1.0) if warmup_steps else weight


def interpolate_buckets(features: Tensor, buckets: Tensor, rows: Tensor, times: Tensor) -> Tensor:
    """A teacher's stored values at any time, `b ...` in the dtype of features, between two stored times.

    Beyond the first and the last stored time those are returned. Computed in float32.
    Shapes: features `n k ...` for n prompts at k equally spaced times; buckets `k`; rows `b`; times `b`.
    """
    times = times.to(device=buckets.device, dtype=torch.float32).clamp(buckets[0], buckets[-1])
    place = (times - buckets[0]) / (buckets[1] - buckets[0])
    low = place.floor().clamp(0, buckets.shape[0] - 2)
    share = (place - low).reshape(-1, *[1] * (features.ndim - 2)).to(features.device)
    index = low.long().to(features.device)
    rows = rows.to(features.device)
    before, after = features[rows, index].float(), features[rows, index + 1].float()
    return ((1 - share) * before + share * after).to(features.dtype)


def attention_statistics(maps: Sequence[Tensor], side: int) -> tuple[Tensor, Tensor]:
    """Statistics `b 3` and map of importance `b side side` of a teacher's self-attention, float32.

    The statistics are locality, entropy and clustering (1 - entropy), each in [0, 1], averaged over layers;
    the map is what every place receives of all the others and sums to 1. Values that are not finite become
    the neutral 0.5 and 1 / side^2. Maps that are not of a square are skipped.
    Shapes: a map `b nh n n` of probabilities for each layer.

    Raises:
        ConfigError: no map is of a square.
    """
    usable = [layer for layer in maps if math.isqrt(layer.shape[-1]) ** 2 == layer.shape[-1]]
    if not usable:
        raise ConfigError(f"attention maps must include one of a square, got {len(maps)} maps of other sizes")
    stats, spatial = zip(*(_layer_statistics(layer, side) for layer in usable), strict=True)
    locality, entropy = torch.stack(stats).mean(dim=0).unbind(-1)
    total = torch.stack(spatial).mean(dim=0)
    total = total / total.sum(dim=(1, 2), keepdim=True).clamp_min(1e-8)
    mean = torch.stack((locality, entropy, 1 - entropy), dim=-1)
    return mean.nan_to_num(nan=0.5), total.nan_to_num(nan=1 / side**2)


def _layer_statistics(layer: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """Locality and entropy `b 2`, and what every place receives, `b side side`."""
    mean = reduce(layer.float(), "b nh q k -> b q k", "mean")
    count = mean.shape[-1]
    width = math.isqrt(count)
    floor = mean.clamp_min(1e-8)
    entropy = -(floor * floor.log()).sum(dim=-1).mean(dim=-1) / math.log(count)
    axis = torch.arange(width, dtype=torch.float32, device=mean.device)
    rows, columns = torch.cartesian_prod(axis, axis).unbind(-1)
    distance = torch.hypot(rows[:, None] - rows, columns[:, None] - columns)
    spread = (mean * distance).sum(dim=-1).mean(dim=-1) / distance.max()
    received = rearrange(mean.sum(dim=1), "b (h w) -> b 1 h w", h=width)
    resized = functional.interpolate(received, (side, side), mode="bilinear")
    return torch.stack(((1 - spread).clamp(0, 1), entropy.clamp(0, 1)), dim=-1), resized[:, 0]


def geometric_statistics(times: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """Statistics `b 3` and maps `b side side` by formula, for times `b`, where there is no teacher.

    The maps sum to 1; far from the centre they are negative at small times, as in the original, whose author
    calls them a mistake as a target.
    """
    stats = torch.stack((1 - times, times, 0.5 - 0.3 * (times - 0.5).abs()), dim=-1)
    axis = torch.linspace(-1, 1, side, device=times.device)
    raw = 1 - torch.hypot(axis[:, None], axis) * rearrange(1 - times, "b -> b 1 1")
    return stats, raw / raw.sum(dim=(1, 2), keepdim=True)
