"""Losses on spectra by hand-checked cases and properties; the stored values are golden cases."""

import math

import pytest
import torch
from torch import Tensor

from flowcore.errors import ConfigError, ShapeError
from flowcore.flow import interpolate
from training.objectives.frequency_losses import (
    LossMix,
    add_offset,
    amplitude_loss,
    coherence_loss,
    mixed_loss,
    self_evaluation,
    velocity_loss,
)

CLEAN = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
NOISE = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(1))
SIGMA = torch.tensor([0.2, 0.4])


def test_velocity_losses_by_hand() -> None:
    predicted, target = torch.tensor([0.0, 0.05, 1.0]), torch.zeros(3)
    assert velocity_loss("mse", predicted, target).item() == pytest.approx((0.05**2 + 1) / 3)
    assert velocity_loss("l1", predicted, target).item() == pytest.approx(1.05 / 3)
    huber = (0.5 * 0.05**2 + 0.1 * (1 - 0.05)) / 3
    assert velocity_loss("huber", predicted, target).item() == pytest.approx(huber)
    with pytest.raises(ConfigError, match="must be one of mse, l1, huber, got 'l2'"):
        velocity_loss("l2", predicted, target)  # type: ignore[arg-type]


def test_losses_on_spectra_vanish_for_equal_latents_and_see_what_they_should() -> None:
    moved = CLEAN.roll(1, dims=-1)  # the same amplitudes under other phases
    assert amplitude_loss(CLEAN, CLEAN, SIGMA).item() == pytest.approx(0, abs=1e-10)
    assert amplitude_loss(moved, CLEAN, SIGMA).item() == pytest.approx(0, abs=1e-10)
    assert coherence_loss(CLEAN, CLEAN, SIGMA).item() == pytest.approx(0, abs=1e-4)
    assert coherence_loss(moved, CLEAN, SIGMA).item() > 1e-2
    assert coherence_loss(3 * CLEAN, CLEAN, SIGMA).item() == pytest.approx(
        0, abs=1e-4
    )  # scale does not count
    assert coherence_loss(-CLEAN, CLEAN, SIGMA).item() == pytest.approx(2, abs=1e-4)


def test_losses_on_spectra_stop_at_their_noise_levels() -> None:
    other = CLEAN + 1
    for loss, level in ((amplitude_loss, 0.5), (coherence_loss, 0.7)):
        assert loss(other, CLEAN, torch.full((2,), level)) == 0
        assert loss(other, CLEAN, torch.full((2,), level - 0.01)) > 0
    half = amplitude_loss(other, CLEAN, torch.tensor([0.2, 0.9]))  # a masked sample counts as zeros
    alone = amplitude_loss(other[:1], CLEAN[:1], torch.tensor([0.2]))
    assert half.item() == pytest.approx(alone.item() / 2)


def test_constant_difference_has_one_frequency() -> None:
    difference, sigma = 0.3, torch.tensor([0.2])
    clean = torch.ones(1, 1, 4, 6)
    expected = (
        (1 - 0.2) ** 2 * (difference * math.sqrt(24)) ** 2 / (4 * 4)
    )  # 4 rows, 4 columns of a half spectrum
    assert amplitude_loss(clean + difference, clean, sigma).item() == pytest.approx(expected, rel=1e-5)


def test_offset_moves_channels_as_a_whole() -> None:
    offsets = torch.randn(2, 3, 1, 1)
    moved = add_offset(NOISE, offsets, 0.1) - NOISE
    assert torch.allclose(moved, (0.1 * offsets).expand_as(NOISE), atol=1e-6)


def perfect(x: Tensor, sigma: Tensor) -> Tensor:
    """Velocity that leads to CLEAN from anywhere."""
    return (x - CLEAN) / sigma[:, None, None, None]


def test_a_perfect_estimate_and_teacher_agree_with_the_data() -> None:
    found = self_evaluation(CLEAN, CLEAN, NOISE, SIGMA, torch.full((2,), 0.5), perfect)
    assert torch.allclose(found.sigma, SIGMA / 2)
    assert (found.weight > 0).all()
    lengths = [part.flatten(1).norm(dim=1) for part in (found.target, CLEAN)]
    assert torch.allclose(*lengths)  # the target keeps the data's length


def test_no_gradient_passes_through_the_target() -> None:
    denoised = CLEAN.clone().requires_grad_()
    found = self_evaluation(denoised, CLEAN, NOISE, SIGMA, torch.full((2,), 0.5), perfect)
    assert not found.target.requires_grad


def test_without_further_parts_the_mix_is_the_velocity_loss() -> None:
    predicted = torch.zeros_like(CLEAN)
    target = interpolate(CLEAN, NOISE, SIGMA).velocity
    plain = LossMix(velocity="l1", amplitude=0, coherence=0)
    assert torch.equal(
        mixed_loss(plain, predicted, CLEAN, NOISE, SIGMA), velocity_loss("l1", predicted, target)
    )
    exact = mixed_loss(LossMix(), target, CLEAN, NOISE, SIGMA)
    assert exact.item() == pytest.approx(0, abs=1e-5)


def test_parts_add_up() -> None:
    predicted = torch.zeros_like(CLEAN)
    parts = [
        mixed_loss(LossMix(amplitude=a, coherence=c), predicted, CLEAN, NOISE, SIGMA).item()
        for a, c in ((0, 0), (0.5, 0), (0, 0.1), (0.5, 0.1))
    ]
    assert parts[3] - parts[0] == pytest.approx(parts[1] + parts[2] - 2 * parts[0], rel=1e-4)
    with pytest.raises(ShapeError, match="estimate_target must be given"):
        mixed_loss(LossMix(self_evaluation=0.3), predicted, CLEAN, NOISE, SIGMA)
