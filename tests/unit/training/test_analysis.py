"""Embedding metrics and the power law, on data with known answers."""

import math

import pytest
import torch

from flowcore.errors import ShapeError
from training.analysis import (
    class_groups,
    components_for,
    fit_power_law,
    nearest,
    similarities,
    variance_shares,
)


def test_similarities_of_a_hand_checked_case() -> None:
    half = math.sqrt(0.5)
    embeddings = torch.tensor([[2.0, 0.0], [3.0, 3.0], [0.0, 1.0], [-1.0, 0.0]])
    found = similarities(embeddings, torch.tensor([0, 0, 1, -1]))
    assert found.same_group == pytest.approx(half)
    assert found.cross_group == pytest.approx((0 + half) / 2)
    assert found.separation_ratio == pytest.approx(2.0)
    assert found.mean_all == pytest.approx((half + 0 - 1 + half - half + 0) / 6)
    assert found.cohesion == {0: pytest.approx(half), 1: None}


def test_ratio_of_nothing_is_undefined() -> None:
    found = similarities(torch.eye(4), torch.tensor([0, 0, 1, 1]))
    assert (found.same_group, found.cross_group, found.separation_ratio) == (0.0, 0.0, None)
    with pytest.raises(ShapeError, match="one number for each embedding"):
        similarities(torch.eye(4), torch.zeros(3))


def test_class_seven_is_a_fish() -> None:
    groups = class_groups(1000)
    assert groups[7] == groups[0]
    assert groups[8] != groups[0]
    assert int((groups == groups[151]).sum()) == 118


def test_variance_and_neighbours() -> None:
    points = torch.tensor([[2.0, 0.0], [-2.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    shares = variance_shares(points)
    assert shares.tolist() == pytest.approx([0.8, 0.2])
    assert (components_for(shares, 0.8), components_for(shares, 0.95)) == (1, 2)
    assert nearest(torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0]]), 1).flatten().tolist() == [1, 0, 1]


def test_exact_power_law_is_found() -> None:
    steps = list(range(100, 20_000, 100))
    fit = fit_power_law(steps, [3.0 * step**-0.45 + 0.7 for step in steps], max_loss=2.0)
    assert (fit.a, fit.b, fit.c) == pytest.approx((3.0, 0.45, 0.7), rel=1e-5)
    assert fit.r2 == pytest.approx(1.0)
    assert fit.points == len(steps) - 1
    assert fit.loss(fit.steps_to(0.8)) == pytest.approx(0.8)
    assert fit.steps_to(0.69) == math.inf


def test_too_few_points() -> None:
    with pytest.raises(ShapeError, match=r"at least 4 points .* got 1"):
        fit_power_law([100, 300], [0.5, 0.5])
