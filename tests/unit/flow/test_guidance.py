import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from flowcore.errors import ConfigError
from flowcore.flow import guidance as g
from flowcore.flow import sigma_grid, velocity_to_denoised
from flowcore.flow.solvers import euler

from .problems import START, Counted, problem_g, problem_m

SHAPE = (2, 3, 4, 5)
SIGMA = torch.tensor([0.8, 0.3], dtype=torch.float64)


def triple() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(SHAPE, generator=generator, dtype=torch.float64) for _ in range(3))


def rules() -> dict[str, g.Combine]:
    return {
        "cfg": g.cfg,
        "rescale": g.cfg_rescale(0.7),
        "zero_star": g.cfg_zero_star,
        "apg": g.apg(g.ApgMomentum(), parallel=0.2, norm_limit=2.0, momentum_factor=-0.5),
    }


def test_a_hand_computed_mix() -> None:
    one, zero = torch.tensor([[3.0]]), torch.tensor([[1.0]])
    velocity = g.guided(lambda *_: one, lambda *_: zero, 4.0)
    assert velocity(one, torch.tensor([0.5])).item() == 9.0


@pytest.mark.parametrize("name", rules())
def test_scale_1_is_the_conditional_and_calls_nothing_else(name: str) -> None:
    conditional, unconditional = Counted(problem_g), Counted(problem_m)
    velocity = g.guided(conditional, unconditional, 1.0, combine=rules()[name])
    assert torch.equal(velocity(START, SIGMA), problem_g(START, SIGMA))
    assert len(conditional.levels) == 1
    assert unconditional.levels == []


@pytest.mark.parametrize("name", rules())
def test_every_rule_at_scale_1_is_the_conditional(name: str) -> None:
    conditional, unconditional, x = triple()
    assert_close(rules()[name](conditional, unconditional, x, SIGMA, 1.0), conditional)


@pytest.mark.parametrize("name", rules())
def test_equal_branches_give_the_same_velocity(name: str) -> None:
    conditional, _, x = triple()
    assert_close(rules()[name](conditional, conditional, x, SIGMA, 5.0), conditional)


@pytest.mark.parametrize("name", rules())
def test_batch_of_two_equals_two_batches(name: str) -> None:
    parts = triple()
    both = rules()[name](*parts, SIGMA, 3.0)
    for i in range(2):
        alone = rules()[name](*(part[i : i + 1] for part in parts), SIGMA[i : i + 1], 3.0)
        assert_close(both[i : i + 1], alone)


def test_cfg_is_the_same_in_velocities_and_in_estimates() -> None:
    conditional, unconditional, x = triple()
    mixed = g.cfg(conditional, unconditional, x, SIGMA, 3.5)
    estimates = [velocity_to_denoised(v, x, SIGMA) for v in (mixed, conditional, unconditional)]
    assert_close(estimates[0], estimates[2] + 3.5 * (estimates[1] - estimates[2]))


def test_one_pair_call_instead_of_two() -> None:
    calls = []

    def pair(x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        calls.append(x.shape)
        return problem_g(x, sigma), problem_m(x, sigma)

    velocity = g.guided_pair(pair, problem_g, 2.0)
    assert_close(velocity(START, SIGMA), g.guided(problem_g, problem_m, 2.0)(START, SIGMA))
    assert calls == [START.shape]


def test_interval_calls_the_conditional_alone_outside() -> None:
    unconditional = Counted(problem_m)
    velocity = g.guided(problem_g, unconditional, 3.0, interval=(0.25, 0.75))
    euler(velocity, START, sigma_grid(10))
    assert unconditional.levels == pytest.approx([0.7, 0.6, 0.5, 0.4, 0.3])
    outside = torch.full((2,), 0.9, dtype=torch.float64)
    assert torch.equal(velocity(START, outside), problem_g(START, outside))


def test_scale_by_level() -> None:
    conditional, unconditional, x = triple()
    for scale, at_quarter in ((g.linear_scale(5.0, 1.0), 2.0), (g.cosine_scale(5.0, 1.0), 3 - math.sqrt(2))):
        assert scale(1.0) == pytest.approx(5.0)
        assert scale(0.0) == pytest.approx(1.0)
        assert scale(0.25) == pytest.approx(at_quarter)
        velocity = g.guided(lambda *_: conditional, lambda *_: unconditional, scale)
        quarter = torch.full((2,), 0.25, dtype=torch.float64)
        assert_close(velocity(x, quarter), g.cfg(conditional, unconditional, x, quarter, at_quarter))


def test_rescale_has_the_spread_of_the_conditional() -> None:
    conditional, unconditional, x = triple()
    full = g.cfg_rescale(1.0)(conditional, unconditional, x, SIGMA, 6.0)
    assert_close(full.flatten(1).std(1), conditional.flatten(1).std(1))
    none = g.cfg_rescale(0.0)(conditional, unconditional, x, SIGMA, 6.0)
    assert_close(none, g.cfg(conditional, unconditional, x, SIGMA, 6.0))
    assert torch.equal(g.cfg_rescale(1.0)(x, torch.zeros_like(x), x, SIGMA, 0.0), torch.zeros_like(x))


def test_zero_star_projects() -> None:
    conditional, unconditional, x = triple()
    alpha = g.zero_star_alpha(conditional, unconditional)
    assert_close(g.zero_star_alpha(2.5 * unconditional, unconditional), torch.full_like(alpha, 2.5))
    residual = conditional - alpha[:, None, None, None] * unconditional
    assert (residual * unconditional).flatten(1).sum(1).abs().max() < 1e-6
    at_zero = g.cfg_zero_star(conditional, unconditional, x, SIGMA, 0.0)
    assert_close(at_zero, alpha[:, None, None, None] * unconditional)


def test_plain_apg_is_cfg() -> None:
    conditional, unconditional, x = triple()
    plain = g.apg(g.ApgMomentum(), parallel=1.0)(conditional, unconditional, x, SIGMA, 4.0)
    assert_close(plain, g.cfg(conditional, unconditional, x, SIGMA, 4.0))


def test_apg_change_is_orthogonal_and_limited() -> None:
    conditional, unconditional, x = triple()
    mixed = g.apg(g.ApgMomentum(), norm_limit=0.5)(conditional, unconditional, x, SIGMA, 3.0)
    estimate = velocity_to_denoised(conditional, x, SIGMA)
    change = velocity_to_denoised(mixed, x, SIGMA) - estimate
    assert (change * estimate).flatten(1).sum(1).abs().max() < 1e-10
    assert (torch.linalg.vector_norm(change.flatten(1), dim=1) <= 2 * 0.5 + 1e-12).all()


def test_apg_momentum_is_held_by_the_caller() -> None:
    conditional, unconditional, x = triple()
    momentum = g.ApgMomentum()
    rule = g.apg(momentum, parallel=1.0, momentum_factor=0.5)
    first = rule(conditional, unconditional, x, SIGMA, 2.0)
    second = rule(conditional, unconditional, x, SIGMA, 2.0)
    assert_close(second - conditional, 1.5 * (first - conditional))
    fresh = g.apg(g.ApgMomentum(), parallel=1.0, momentum_factor=0.5)(
        conditional, unconditional, x, SIGMA, 2.0
    )
    assert torch.equal(fresh, first)


def test_apg_at_sigma_0_is_the_conditional() -> None:
    conditional, unconditional, x = triple()
    rule = g.apg(g.ApgMomentum(average=x), momentum_factor=0.5)
    assert torch.equal(rule(conditional, unconditional, x, torch.zeros(2), 4.0), conditional)


def test_half_precision_branches_are_mixed_in_the_dtype_of_the_state() -> None:
    x = START.float()
    a, b = (torch.full((2, 4), value).to(torch.bfloat16) for value in (1.0, 1.0078125))
    mixed = g.guided(lambda *_: a, lambda *_: b, 7.3)(x, SIGMA.float())
    assert mixed.dtype is torch.float32
    assert_close(mixed, torch.full((2, 4), 1.0078125 - 7.3 * 0.0078125))


def test_errors() -> None:
    for scale in (math.nan, math.inf):
        with pytest.raises(
            ConfigError, match=r"guidance scale must be finite, got .*; 1 switches guidance off"
        ):
            g.guided(problem_g, problem_m, scale)
    for interval in ((0.5, 0.2), (-0.1, 0.5), (0.2, 1.1)):
        with pytest.raises(
            ConfigError, match=r"guidance interval must be two rising levels within \[0, 1\], got"
        ):
            g.guided(problem_g, problem_m, 2.0, interval=interval)
    with pytest.raises(ConfigError, match=r"rescale amount must lie in \[0, 1\], got 1\.5"):
        g.cfg_rescale(1.5)
    with pytest.raises(ConfigError, match=r"norm_limit must be 0 \(none\) or above, got -1"):
        g.apg(g.ApgMomentum(), norm_limit=-1.0)
    with pytest.raises(ConfigError, match=r"momentum_factor must lie in \[-1, 1\], got 2"):
        g.apg(g.ApgMomentum(), momentum_factor=2.0)
