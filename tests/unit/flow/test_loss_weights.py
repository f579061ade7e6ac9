import pytest
import torch
from torch.testing import assert_close

from flowcore.errors import ConfigError
from flowcore.flow import interpolate, loss_weights, velocity_to_denoised, velocity_to_noise
from flowcore.flow.loss_weights import LOSS_WEIGHTS
from flowcore.flow.noise_levels import CosMap

SIGMA = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)


@pytest.mark.parametrize("name", LOSS_WEIGHTS)
def test_weights_are_positive_and_of_the_same_shape(name: str) -> None:
    weight = LOSS_WEIGHTS[name](SIGMA.float())
    assert weight.shape == SIGMA.shape
    assert weight.dtype is torch.float32
    assert (weight > 0).all()


def test_weights_turn_the_velocity_error_into_the_other_errors() -> None:
    generator = torch.Generator().manual_seed(0)
    clean, noise, error = (torch.randn(19, 5, generator=generator, dtype=torch.float64) for _ in range(3))
    sample = interpolate(clean, noise, SIGMA)
    predicted = sample.velocity + error
    velocity_loss = error.square().mean(1)
    noise_loss = (velocity_to_noise(predicted, sample.noised, SIGMA) - noise).square().mean(1)
    clean_loss = (velocity_to_denoised(predicted, sample.noised, SIGMA) - clean).square().mean(1)
    assert_close(loss_weights.eps(SIGMA) * velocity_loss, noise_loss)
    assert_close(loss_weights.x0(SIGMA) * velocity_loss, clean_loss)


def test_min_snr_in_both_meanings() -> None:
    sigma = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)  # ratios 16, 1, 1/81
    assert_close(loss_weights.min_snr(sigma), torch.tensor([5 / 16, 1.0, 1.0], dtype=torch.float64))
    expected = torch.tensor([5 * 0.04, 0.25, 0.01], dtype=torch.float64)
    assert_close(loss_weights.min_snr_x0(sigma), expected)


def test_cosmap_weight_is_the_density_of_the_law() -> None:
    assert_close(loss_weights.cosmap(SIGMA), CosMap().density(SIGMA))
    assert_close(loss_weights.sigma_sqrt(SIGMA), 1 / SIGMA**2)


def test_bad_gamma() -> None:
    with pytest.raises(ConfigError, match="gamma of the min-SNR weight must be above 0, got 0"):
        loss_weights.min_snr(SIGMA, 0.0)
