import math

import pytest
import torch
from torch.testing import assert_close

from flowcore.errors import ConfigError
from flowcore.flow import schedule

U = torch.linspace(0, 1, 101, dtype=torch.float64)


@pytest.mark.parametrize("shift", [1 / 3, 1.0, 3.0, 12.5])
def test_shift_is_monotone_and_keeps_the_ends(shift: float) -> None:
    moved = schedule.shift_sigma(U, shift)
    assert moved[0] == 0
    assert moved[-1] == 1
    assert (moved.diff() > 0).all()


def test_shifts_compose_and_reverse() -> None:
    assert_close(schedule.shift_sigma(schedule.shift_sigma(U, 2.5), 0.7), schedule.shift_sigma(U, 2.5 * 0.7))
    assert_close(schedule.shift_sigma(schedule.shift_sigma(U, 3.0), 1 / 3), U)
    assert_close(1 - schedule.shift_sigma(1 - U, 3.0), schedule.shift_sigma(U, 1 / 3))


def test_mu_of_flux1() -> None:
    for tokens, mu in ((256, 0.5), (1024, 0.63), (4096, 1.15), (8100, 1.82776)):
        assert abs(schedule.flux1_mu(tokens) - mu) < 5e-6


def test_mu_of_flux2_jumps_at_4300_tokens() -> None:
    published = (
        (4096, 50, 2.02335),
        (1024, 28, 1.85918),
        (4096, 4, 2.29118),
        (4300, 50, 2.0447),
        (4301, 50, 1.1847),
    )
    for tokens, steps, mu in published:
        assert abs(schedule.flux2_mu(tokens, steps) - mu) < 5e-5


def test_resolution_shift() -> None:
    assert schedule.resolution_shift(4096, 1024) == 2.0


def test_grid_of_a_static_shift() -> None:
    expected = [1, 0.96429, 0.92308, 0.875, 0.81818, 0.75, 0.66667, 0.5625, 0.42857, 0.25, 0]
    grid = schedule.sigma_grid(10, 3.0)
    assert grid.dtype is torch.float64
    assert_close(grid, torch.tensor(expected, dtype=torch.float64), atol=5e-6, rtol=0)
    assert grid[0] == 1
    assert grid[-1] == 0


def test_grid_of_flux1_is_the_exponential_form() -> None:
    mu = schedule.flux1_mu(1024)
    u = torch.linspace(1, 0, 29, dtype=torch.float64)[:-1]
    expected = math.exp(mu) / (math.exp(mu) + (1 / u - 1))
    assert_close(schedule.sigma_grid(28, math.exp(mu))[:-1], expected)


@pytest.mark.parametrize(("steps", "strength"), [(6, 0.6), (20, 0.75), (7, 0.33), (1, 0.5)])
def test_strength_takes_the_tail_of_a_longer_grid(steps: int, strength: float) -> None:
    whole = schedule.sigma_grid(int(steps / strength), 1.7)
    grid = schedule.sigma_grid(steps, 1.7, strength=strength)
    assert grid.shape == (steps + 1,)
    assert torch.equal(grid, whole[-(steps + 1) :])


def test_strength_just_below_1_is_the_whole_grid() -> None:
    assert torch.equal(schedule.sigma_grid(5, strength=0.99995), schedule.sigma_grid(5))


def test_start_gives_the_first_level_exactly() -> None:
    grid = schedule.sigma_grid(8, 3.0, start=0.6)
    assert grid[0] == 0.6
    assert grid[-1] == 0
    assert grid.shape == (9,)
    unshifted = schedule.shift_sigma(grid, 1 / 3)
    assert_close(unshifted.diff(), (-unshifted[0] / 8).expand(8))
    assert torch.equal(schedule.sigma_grid(8, 3.0, start=1.0), schedule.sigma_grid(8, 3.0))


def test_zero_init_drops_the_first_steps() -> None:
    grid = schedule.sigma_grid(4)
    assert torch.equal(schedule.zero_init(grid), grid[1:])
    assert torch.equal(schedule.zero_init(grid, 0), grid)
    with pytest.raises(ConfigError, match=r"zero-init steps must lie in 0\.\.3 for this grid, got 4"):
        schedule.zero_init(grid, 4)


@pytest.mark.parametrize("shift", [0.0, -1.0, math.nan, math.inf])
def test_bad_shift(shift: float) -> None:
    with pytest.raises(ConfigError, match="shift must be a number above 0, got"):
        schedule.shift_sigma(U, shift)
    with pytest.raises(ConfigError, match="shift must be a number above 0, got"):
        schedule.sigma_grid(4, shift)


def test_bad_grids() -> None:
    with pytest.raises(ConfigError, match="num_steps must be at least 1, got 0"):
        schedule.sigma_grid(0)
    for strength in (0.0, 1.2, math.nan):
        with pytest.raises(ConfigError, match="strength must lie above 0 and at most at 1"):
            schedule.sigma_grid(4, strength=strength)
    with pytest.raises(ConfigError, match="start must lie above 0 and at most at 1, got 0"):
        schedule.sigma_grid(4, start=0.0)
    with pytest.raises(ConfigError, match=r"strength must be left at 1 when start is given, got 0\.5"):
        schedule.sigma_grid(4, strength=0.5, start=0.5)
