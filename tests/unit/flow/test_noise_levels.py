import math

import pytest
import torch
from torch.testing import assert_close

from flowcore.errors import ConfigError
from flowcore.flow import noise_levels
from flowcore.flow.noise_levels import (
    LAWS,
    Beta,
    CosMap,
    LogitNormal,
    Mode,
    NoiseLaw,
    Shifted,
    Uniform,
    noise_law,
    sample_sigma,
)
from flowcore.flow.schedule import shift_sigma

EVERY_LAW = [
    Uniform(),
    LogitNormal(),
    LogitNormal(0.5, 0.8),
    Mode(1.29),
    Mode(-0.5),
    CosMap(),
    Beta(),
    Shifted(CosMap(), 3.0),
    Shifted(Mode(), 0.4),
]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("law", EVERY_LAW, ids=repr)
def test_density_is_that_of_the_map(law: NoiseLaw) -> None:
    u = torch.linspace(0.02, 0.98, 49, dtype=torch.float64)
    step = 1e-6
    slope = (law.quantile(u + step) - law.quantile(u - step)).abs() / (2 * step)
    assert_close(law.density(law.quantile(u)), 1 / slope, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("law", EVERY_LAW, ids=repr)
def test_density_integrates_to_1(law: NoiseLaw) -> None:
    sigma = (torch.arange(20000, dtype=torch.float64) + 0.5) / 20000
    assert abs(law.density(sigma).mean().item() - 1) < 1e-3


@pytest.mark.parametrize("name", LAWS)
def test_samples_lie_within_the_floor_in_float32(name: str) -> None:
    sigma = sample_sigma(name, 4096, generator(), floor=1e-3)
    assert sigma.dtype is torch.float32
    assert sigma.shape == (4096,)
    assert sigma.min() >= torch.tensor(1e-3)
    assert sigma.max() <= torch.tensor(1 - 1e-3)


def test_the_upper_clamp_stays_below_1() -> None:
    sigma = sample_sigma("logit_normal", 64, generator(), mean=30.0)
    assert (sigma < 1).all()
    assert (sample_sigma("logit_normal", 64, generator(), mean=50.0, floor=0) == 1).all()


def test_same_generator_same_levels() -> None:
    assert torch.equal(sample_sigma("beta", 8, generator(5)), sample_sigma("beta", 8, generator(5)))


def test_mean_of_beta_and_of_logit_normal() -> None:
    beta = sample_sigma("beta", 5000, generator(), stratified=True, alpha=2.5, beta=2.0)
    assert abs(beta.mean().item() - 2.5 / 4.5) < 1e-4
    logits = torch.logit(
        sample_sigma("logit_normal", 20000, generator(), stratified=True, mean=-1.0, std=0.5)
    )
    assert abs(logits.mean().item() + 1) < 1e-3
    assert abs(logits.std().item() - 0.5) < 2e-3


def test_stratified_levels_fill_every_part_once_in_random_order() -> None:
    u = noise_levels.stratified_uniform(64, generator(2))
    assert sorted((u * 64).long().tolist()) == list(range(64))
    assert not torch.equal(u, u.sort().values)


def test_shift_of_a_logit_normal_is_a_logit_normal() -> None:
    law = noise_law("logit_normal", mean=0.2, std=0.9, shift=3.0)
    assert law == LogitNormal(0.2 + math.log(3.0), 0.9)
    u = torch.linspace(0.1, 0.9, 9, dtype=torch.float64)
    assert_close(law.quantile(u), shift_sigma(LogitNormal(0.2, 0.9).quantile(u), 3.0))
    assert_close(law.density(u), Shifted(LogitNormal(0.2, 0.9), 3.0).density(u))


def test_shift_1_is_no_shift() -> None:
    assert noise_law("cosmap", shift=1.0) == CosMap()
    assert noise_law("uniform", shift=2.0) == Shifted(Uniform(), 2.0)


def test_density_correction_makes_one_mean_another() -> None:
    drawn, wanted = Beta(2.5, 2.0), Uniform()
    sigma = sample_sigma(drawn, 5000, generator(), stratified=True).double()
    weight = noise_levels.density_correction(sigma, drawn, wanted)
    assert abs((weight * sigma**2).mean().item() - 1 / 3) < 2e-3


def test_errors() -> None:
    with pytest.raises(ConfigError, match=r"noise law must be one of uniform, logit_normal, .*, got 'gauss'"):
        sample_sigma("gauss", 4, generator())
    with pytest.raises(
        ConfigError, match=r"parameters of the noise law cosmap must be its own, got \['mean'\]"
    ):
        sample_sigma("cosmap", 4, generator(), mean=1.0)
    with pytest.raises(ConfigError, match=r"a law object must come without parameters, got \['mean'\]"):
        sample_sigma(Uniform(), 4, generator(), mean=1.0)
    with pytest.raises(ConfigError, match=r"floor must be 0 or lie in 1e-6\.\.0\.01, got 0\.5"):
        sample_sigma("uniform", 4, generator(), floor=0.5)
    with pytest.raises(ConfigError, match="std of the logit-normal law must be above 0, got 0"):
        LogitNormal(0.0, 0.0)
    with pytest.raises(ConfigError, match=r"scale of the mode law must lie in -1\.\.1\.7519, got 2"):
        Mode(2.0)
    with pytest.raises(ConfigError, match="beta of the beta law must lie above 0 and at most at 100, got 0"):
        Beta(1.0, 0.0)
    with pytest.raises(ConfigError, match="shift must be a number above 0"):
        Shifted(Uniform(), 0.0)
