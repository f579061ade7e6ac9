"""The Runge-Kutta rule with its last call in the middle of the step."""

from functools import partial

import torch
from torch import Tensor
from torch.testing import assert_close

from flowcore.flow import SOLVERS, rk4, rk4_reference

from .problems import START, Counted, problem_g, solution_g, uniform_grid


def test_it_is_the_classical_rule_where_the_level_does_not_matter() -> None:
    def velocity(x: Tensor, _sigma: Tensor) -> Tensor:
        return x.sin()

    grid = uniform_grid(4)
    assert_close(rk4_reference(velocity, START, grid), partial(rk4, final_step="full")(velocity, START, grid))


def test_levels_of_its_calls() -> None:
    counted = Counted(problem_g)
    rk4_reference(counted, START, torch.tensor([0.8, 0.4, 0.2], dtype=torch.float64))
    assert [round(float(level), 6) for level in counted.levels] == [0.8, 0.6, 0.6, 0.6, 0.4, 0.3, 0.3, 0.3]


def test_order_is_one() -> None:
    expected = solution_g(0.9, 0.2)
    coarse, fine = (
        (rk4_reference(problem_g, START, uniform_grid(steps)) - expected).abs().max().item()
        for steps in (64, 128)
    )
    assert 1.7 < coarse / fine < 2.3


def test_it_is_not_offered_by_name() -> None:
    assert "rk4_reference" not in SOLVERS
