import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from flowcore.errors import ConfigError, FlowCoreError
from flowcore.flow import StepState, sigma_grid
from flowcore.flow.runge_kutta import BOGACKI_SHAMPINE, DORMAND_PRINCE, Tableau, bosh3, dopri5

from .problems import START, Counted, problem_g, problem_m, row, solution_g

# Published: error and calls from sigma 1 to 0 on problem G, by rtol, with atol a tenth of it.
REFERENCE = [
    (bosh3, 1e-3, 1.8e-3, 28),
    (bosh3, 1e-5, 3.5e-5, 109),
    (bosh3, 1e-7, 5.1e-7, 373),
    (dopri5, 1e-3, 4.2e-3, 31),
    (dopri5, 1e-5, 7.5e-5, 73),
    (dopri5, 1e-7, 4.4e-8, 139),
]


@pytest.mark.parametrize("tableau", [BOGACKI_SHAMPINE, DORMAND_PRINCE])
def test_rows_and_weights_are_consistent(tableau: Tableau) -> None:
    for node, weights in zip(tableau.nodes, tableau.rows, strict=True):
        assert sum(weights) == pytest.approx(node, abs=1e-14)
    for weights in (tableau.weights, tableau.low):
        for power in range(tableau.order if weights is tableau.weights else tableau.order - 1):
            moment = sum(w * node**power for w, node in zip(weights, tableau.nodes, strict=True))
            assert moment == pytest.approx(1 / (power + 1), abs=1e-14)


@pytest.mark.parametrize(("solver", "rtol", "error", "calls"), REFERENCE)
def test_error_and_calls_of_the_reference_run(solver: object, rtol: float, error: float, calls: int) -> None:
    counted = Counted(problem_g)
    end = solver(counted, START, row(1.0, 0.0), rtol=rtol, atol=rtol / 10, final_step="full")
    assert (end - solution_g(1, 0)).abs().max().item() == pytest.approx(error, rel=0.03)
    assert len(counted.levels) == calls


@pytest.mark.parametrize("solver", [bosh3, dopri5])
def test_the_network_is_never_asked_below_the_floor(solver: object) -> None:
    counted = Counted(problem_g)
    end = solver(counted, START, row(1.0, 0.0), rtol=1e-6, atol=1e-7)
    assert min(counted.levels) == pytest.approx(1e-4)
    assert_close(end, solution_g(1, 0), atol=2e-5, rtol=0)


@pytest.mark.parametrize("solver", [bosh3, dopri5])
def test_a_start_below_the_floor_is_one_euler_step(solver: object) -> None:
    counted = Counted(problem_g)
    end = solver(counted, START, row(5e-5, 0.0))
    assert_close(end, START - 5e-5 * problem_g(START, row(5e-5, 5e-5)))
    assert len(counted.levels) == 1


def test_a_run_upwards_undoes_a_run_downwards() -> None:
    options = {"rtol": 1e-9, "atol": 1e-10, "max_calls": 10000}
    down = dopri5(problem_m, START, row(0.9, 0.1), **options)
    assert_close(dopri5(problem_m, down, row(0.1, 0.9), **options), START, atol=1e-6, rtol=0)


def test_error_by_sample_is_at_least_as_strict() -> None:
    x = torch.cat([START, torch.zeros(30, 4, dtype=torch.float64)])
    whole, single = Counted(problem_m), Counted(problem_m)
    bosh3(whole, x, row(1.0, 0.0), rtol=1e-5, atol=1e-6)
    bosh3(single, x, row(1.0, 0.0), rtol=1e-5, atol=1e-6, error_norm="sample")
    assert len(single.levels) > len(whole.levels)


def test_progress_never_falls_and_stays_within_the_grid() -> None:
    states: list[StepState] = []
    grid = sigma_grid(10, 2.0)
    dopri5(problem_m, START, grid, rtol=1e-5, atol=1e-6, callback=states.append)
    steps = [state.step for state in states]
    assert steps == sorted(steps)
    assert steps[0] == 0
    assert steps[-1] == 9
    assert {state.num_steps for state in states} == {10}
    for state in states:
        assert grid[state.step] >= state.sigma > grid[state.step + 1]
        assert state.sigma_next == grid[state.step + 1]
        assert_close(state.velocity, problem_m(state.x, row(state.sigma, state.sigma)))


def test_cap_on_calls() -> None:
    counted = Counted(problem_m)
    with pytest.raises(
        FlowCoreError, match=r"must finish within max_calls 50, got to sigma 0\.\d+; raise max_calls"
    ):
        dopri5(counted, START, row(1.0, 0.0), rtol=1e-9, atol=1e-10, max_calls=50)
    assert len(counted.levels) <= 50


def test_a_velocity_that_is_not_finite() -> None:
    def velocity(x: Tensor, sigma: Tensor) -> Tensor:
        return x / (sigma[:, None] > 0.5)

    with pytest.raises(FlowCoreError, match="velocity must be finite, got NaN or infinity near sigma"):
        bosh3(velocity, START, row(1.0, 0.0))


def test_bad_options() -> None:
    for bad in (0.0, 1.0, -1e-3, math.nan):
        with pytest.raises(ConfigError, match="rtol must lie between 0 and 1, got"):
            bosh3(problem_g, START, row(1.0, 0.0), rtol=bad)
        with pytest.raises(ConfigError, match="atol must lie between 0 and 1, got"):
            dopri5(problem_g, START, row(1.0, 0.0), atol=bad)
    with pytest.raises(ConfigError, match="error_norm must be batch or sample, got 'max'"):
        dopri5(problem_g, START, row(1.0, 0.0), error_norm="max")
