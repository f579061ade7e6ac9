"""Losses of distillation, and what is computed from teachers."""

import math

import pytest
import torch

from flowcore.errors import ConfigError
from tests.support import EXACT_LIMIT, FORWARD_LIMIT, assert_close
from training.objectives.distillation import (
    BUCKETS,
    attention_statistics,
    geometric_statistics,
    huber,
    interpolate_buckets,
    lune_loss,
    ramp,
    sol_loss,
    velocity_loss,
)


def test_huber_is_a_parabola_then_a_line() -> None:
    errors = torch.tensor([0.0, 0.1, -0.1, 0.2, -1.0])
    assert_close(huber(errors, 0.1), torch.tensor([0.0, 0.005, 0.005, 0.015, 0.095]), limit=FORWARD_LIMIT)


def test_velocity_loss_weighs_cells_and_samples() -> None:
    predicted, target = torch.randn(2, 3, 4, 6), torch.randn(2, 3, 4, 6)
    squares = (predicted - target).square()
    assert_close(velocity_loss(predicted, target), squares.mean(), limit=FORWARD_LIMIT)
    left = torch.zeros(2, 4, 6)
    left[..., :3] = 1
    masked = velocity_loss(predicted, target, mask=left, mask_weights=(1.0, 0.0))
    assert_close(masked, squares[..., :3].mean() / 2, limit=FORWARD_LIMIT)
    even = velocity_loss(predicted, target, importance=torch.full((2, 8, 8), 0.02))
    assert_close(even, squares.mean(), limit=1e-4)
    weighted = velocity_loss(predicted, target, weights=torch.tensor([1.0, 0.0]))
    assert_close(weighted, squares[0].mean() / 2, limit=FORWARD_LIMIT)


def test_lune_losses() -> None:
    predicted = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    target = torch.tensor([[0.0, 1.0], [0.0, 1.0]])
    losses = {mode: lune_loss(predicted, target, mode).item() for mode in ("cosine", "huber", "soft", "hard")}
    assert losses == pytest.approx({"cosine": 0.5, "huber": 0.07125, "soft": 0.0075, "hard": 0.75})
    present = torch.tensor([False, True])
    assert lune_loss(predicted, target, present=present).item() == pytest.approx(0.0, abs=1e-6)
    assert lune_loss(predicted, target, "hard", present=present).item() == 0.5
    assert lune_loss(predicted, target, present=torch.zeros(2, dtype=torch.bool)) == 0
    with pytest.raises(ConfigError, match="lune mode must be one of cosine, huber, soft, hard, got 'l2'"):
        lune_loss(predicted, target, "l2")  # type: ignore[arg-type]


def test_absent_teachers_give_no_gradient_even_if_their_place_holds_no_number() -> None:
    predicted = torch.randn(2, 4, requires_grad=True)
    target = torch.tensor([[1.0] * 4, [math.nan] * 4])
    lune_loss(predicted, target, "hard", present=torch.tensor([True, False])).backward()
    assert predicted.grad is not None
    assert predicted.grad[0].any()
    assert not predicted.grad[1].nan_to_num(nan=1.0).any()


def test_sol_loss_sums_its_parts() -> None:
    stats, maps = torch.zeros(2, 3), torch.zeros(2, 4, 4)
    predicted = (torch.ones(2, 3), torch.full((2, 4, 4), 2.0))
    assert sol_loss(predicted, (stats, maps)).item() == 5.0
    assert sol_loss(predicted, (stats, maps), part_weights=(0.5, 2.0)).item() == 8.5
    assert sol_loss(predicted, (predicted[0], maps), present=torch.tensor([True, False])).item() == 4.0


def test_ramp() -> None:
    assert [ramp(0.1, step, 1000) for step in (0, 500, 1000, 5000)] == [0.0, 0.05, 0.1, 0.1]
    assert ramp(0.1, 0, 0) == 0.1


def test_stored_features_are_joined_in_straight_lines() -> None:
    buckets = torch.tensor(BUCKETS)
    features = torch.stack([buckets, 2 * buckets])[..., None]  # n k 1
    times = torch.tensor([0.0, 0.05, 0.3, 0.77, 1.0])
    rows = torch.tensor([0, 1, 0, 1, 0])
    expected = torch.tensor([[0.05], [0.1], [0.3], [1.54], [0.95]])
    assert_close(interpolate_buckets(features, buckets, rows, times), expected, limit=FORWARD_LIMIT)
    half = interpolate_buckets(features.half(), buckets, rows, times)
    assert half.dtype == torch.float16


def test_attention_on_itself_is_local_and_even_attention_is_not() -> None:
    itself = torch.eye(16).expand(1, 2, -1, -1)
    stats, spatial = attention_statistics([itself], 8)
    assert_close(stats, torch.tensor([[1.0, 0.0, 1.0]]), limit=1e-4)
    assert_close(spatial, torch.full((1, 8, 8), 1 / 64), limit=FORWARD_LIMIT)
    even = torch.full((1, 3, 64, 64), 1 / 64)
    stats, spatial = attention_statistics([even, torch.rand(1, 2, 7, 7)], 8)  # the other is of no square
    distances = torch.cdist(*[torch.cartesian_prod(torch.arange(8.0), torch.arange(8.0))] * 2)
    assert stats[0, 1].item() == pytest.approx(1.0, abs=1e-5)
    assert stats[0, 0].item() == pytest.approx(1 - (distances.mean() / distances.max()).item(), abs=1e-4)
    assert spatial.sum().item() == pytest.approx(1.0, abs=1e-6)
    with pytest.raises(ConfigError, match="attention maps must include one of a square, got 1 maps"):
        attention_statistics([torch.rand(1, 2, 7, 7)], 8)


def test_values_that_are_not_finite_become_neutral() -> None:
    stats, spatial = attention_statistics([torch.full((1, 1, 16, 16), math.nan)], 4)
    assert torch.equal(stats, torch.full((1, 3), 0.5))
    assert torch.equal(spatial, torch.full((1, 4, 4), 1 / 16))


def test_formula_in_the_place_of_a_teacher() -> None:
    stats, maps = geometric_statistics(torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64), 8)
    assert stats.tolist() == [[1.0, 0.0, 0.35], [0.5, 0.5, 0.5], [0.0, 1.0, 0.35]]
    assert_close(maps.sum(dim=(1, 2)), torch.ones(3, dtype=torch.float64), limit=EXACT_LIMIT)
    assert maps[0].min() < 0
