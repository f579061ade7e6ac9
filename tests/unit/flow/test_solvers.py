import math
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from flowcore.errors import ConfigError, ShapeError
from flowcore.flow import (
    SOLVERS,
    StepState,
    cfg_rescale,
    from_data_time,
    generator_noise,
    guided,
    interpolate,
    masked_velocity,
    sigma_grid,
)
from flowcore.flow import runge_kutta as rk
from flowcore.flow import solvers as s

from .problems import START, Counted, constant, problem_g, problem_m, row, solution_g, uniform_grid

FULL = {"final_step": "full"}
LOGSNR = partial(s.dpmpp_2m, lambda_kind="logsnr")
FIXED = {
    "euler": s.euler,
    "ddim": s.ddim,
    "ab2": s.ab2,
    "midpoint": s.midpoint,
    "heun": s.heun,
    "dpmpp_2m log_t": s.dpmpp_2m,
    "dpmpp_2m logsnr": LOGSNR,
    "bosh3": rk.bosh3_fixed,
    "rk4": s.rk4,
    "dopri5": rk.dopri5_fixed,
}
ON_THE_GRID = sorted(set(SOLVERS) - {"bosh3", "dopri5"})  # the others choose their own steps
STOCHASTIC = {"ddim": partial(s.ddim, eta=1.0), "euler_ancestral": s.euler_ancestral}

# Published errors at 64 steps from sigma 0.9 to 0.2, and the order between 64 and 128 steps.
ORDERS_G = {
    "euler": (4.618e-2, 1),
    "ddim": (4.618e-2, 1),
    "ab2": (5.280e-4, 2),
    "midpoint": (8.432e-7, 3),
    "heun": (2.660e-4, 2),
    "dpmpp_2m log_t": (7.434e-4, 2),
    "dpmpp_2m logsnr": (1.186e-3, 2),
    "bosh3": (3.767e-7, 3),
    "rk4": (4.148e-9, 4),
}
ORDERS_M = {
    "euler": (4.70e-2, 1),
    "ddim": (4.70e-2, 1),
    "ab2": (1.278e-3, 2),
    "midpoint": (5.177e-4, 2),
    "heun": (6.892e-4, 2),
    "dpmpp_2m log_t": (2.185e-4, 2),
    "dpmpp_2m logsnr": (1.173e-3, 2),
    "bosh3": (8.656e-6, 3),
    "rk4": (2.927e-7, 4),
}


@pytest.fixture(scope="module")
def solution_m() -> Tensor:
    return s.rk4(problem_m, START, uniform_grid(2000))


def error(name: str, velocity: object, expected: Tensor, num_steps: int) -> float:
    return (FIXED[name](velocity, START, uniform_grid(num_steps)) - expected).abs().max().item()


@pytest.mark.parametrize("name", ORDERS_G)
def test_order_on_gaussian_data(name: str) -> None:
    expected = solution_g(0.9, 0.2)
    published, order = ORDERS_G[name]
    first, second = error(name, problem_g, expected, 64), error(name, problem_g, expected, 128)
    assert first == pytest.approx(published, rel=2e-3)
    assert abs(math.log2(first / second) - order) < 0.3


@pytest.mark.parametrize("name", ORDERS_M)
def test_order_on_a_mixture(name: str, solution_m: Tensor) -> None:
    published, order = ORDERS_M[name]
    first, second = error(name, problem_m, solution_m, 64), error(name, problem_m, solution_m, 128)
    assert first == pytest.approx(published, rel=2e-3)
    assert abs(math.log2(first / second) - order) < 0.3


def test_order_of_dopri5() -> None:
    expected = solution_g(0.9, 0.2)
    first, second = (error("dopri5", problem_g, expected, steps) for steps in (16, 32))
    assert first == pytest.approx(1.62e-9, rel=2e-2)
    assert math.log2(first / second) > 4.7


@pytest.mark.parametrize("name", FIXED)
def test_error_falls_over_the_whole_interval(name: str) -> None:
    expected = solution_g(1, 0)
    grids = (sigma_grid(steps) for steps in (8, 32, 128))
    errors = [(FIXED[name](problem_g, START, grid) - expected).abs().max().item() for grid in grids]
    assert errors[0] > errors[1] > errors[2]


@pytest.mark.parametrize("name", SOLVERS)
def test_constant_velocity_is_exact(name: str) -> None:
    noise = generator_noise(torch.Generator().manual_seed(0))
    eta = {"eta": 0.0} if name == "euler_ancestral" else {}
    end = SOLVERS[name](constant, START, sigma_grid(5, 2.0), noise=noise, **eta)
    assert_close(end, START - 0.75)


def test_one_euler_step_from_noise_is_exact_for_a_point() -> None:
    point = row(1.0, -2.0, 0.5, 3.0)

    def velocity(x: Tensor, sigma: Tensor) -> Tensor:
        return (x - point) / sigma[:, None]

    assert_close(s.euler(velocity, START, sigma_grid(1)), point.expand(2, 4))


def test_ddim_without_noise_is_euler() -> None:
    grid = sigma_grid(12, 1.7)
    assert_close(s.ddim(problem_m, START, grid), s.euler(problem_m, START, grid), rtol=0, atol=1e-13)
    assert_close(s.euler_ancestral(problem_m, START, grid, eta=0.0), s.euler(problem_m, START, grid))


@pytest.mark.parametrize("name", ["heun", "rk4", "ab2", "ddim", "euler_ancestral", "dpmpp_2m"])
def test_a_single_step_to_0_is_euler(name: str) -> None:
    expected = s.euler(problem_m, START, row(0.8, 0.0))
    assert_close(SOLVERS[name](problem_m, START, row(0.8, 0.0)), expected)


def test_data_time_gives_the_same_trajectory() -> None:
    def network(x: Tensor, time: Tensor) -> Tensor:
        return -problem_m(x, 1 - time)

    grid = sigma_grid(9, 1 / 3)
    assert_close(s.heun(from_data_time(network), START, grid), s.heun(problem_m, START, grid))


@pytest.mark.parametrize("name", FIXED)
def test_calls_and_no_call_at_0(name: str) -> None:
    num_calls = {"midpoint": 8, "heun": 7, "bosh3": 12, "rk4": 13, "dopri5": 19}
    counted = Counted(problem_g)
    FIXED[name](counted, START, sigma_grid(4))
    assert len(counted.levels) == num_calls.get(name, 4)
    assert min(counted.levels) > 0


@pytest.mark.parametrize("solver", [s.heun, s.rk4, rk.dopri5_fixed])
def test_the_full_final_step_asks_at_0(solver: s.Solver) -> None:
    counted = Counted(problem_g)
    solver(counted, START, sigma_grid(4), **FULL)
    assert min(counted.levels) == 0


@pytest.mark.parametrize("name", ON_THE_GRID)
def test_batch_of_two_equals_two_batches(name: str) -> None:
    noise = torch.randn(6, 2, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    run = partial(SOLVERS[name], problem_m, sigmas=sigma_grid(6))
    both = run(x=START, noise=lambda step, _: noise[step])
    for i in range(2):
        alone = run(x=START[i : i + 1], noise=lambda step, _, i=i: noise[step, i : i + 1])
        assert_close(both[i : i + 1], alone)


@pytest.mark.parametrize("name", STOCHASTIC)
def test_stochastic_solvers_keep_the_distribution(name: str) -> None:
    """Gaussian data with mean 2 and deviation 0.5: samples must have both, which wrong noise levels spoil."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(1, 20000, generator=generator, dtype=torch.float64)

    def velocity(x: Tensor, sigma: Tensor) -> Tensor:
        level = sigma[:, None]
        slope = (level - (1 - level) * 0.25) / ((1 - level) ** 2 * 0.25 + level**2)
        return -2 + slope * (x - (1 - level) * 2)

    end = STOCHASTIC[name](velocity, start, sigma_grid(500), noise=generator_noise(generator))
    assert abs(end.mean().item() - 2) < 0.01
    assert abs(end.std().item() - 0.5) < 0.01


def test_ddim_noise_is_the_posterior_deviation() -> None:
    """With exact estimates, a step at eta 1 has the mean and deviation of q(x_b | x_a, clean)."""
    start, end = 0.8, 0.5
    clean, noised = 1.5, -0.4
    gain = (1 - start) / (1 - end)  # x_a = gain * x_b + noise of variance a^2 - gain^2 b^2
    spread = start**2 - gain**2 * end**2
    variance = 1 / (1 / end**2 + gain**2 / spread)
    mean = variance * ((1 - end) * clean / end**2 + gain * noised / spread)

    def step(z: float) -> float:
        def velocity(x: Tensor, sigma: Tensor) -> Tensor:
            return (x - clean) / sigma[:, None]

        x = row(noised)[None]
        grid = row(start, end)
        return s.ddim(velocity, x, grid, eta=1.0, noise=lambda _, like: torch.full_like(like, z)).item()

    assert step(0.0) == pytest.approx(mean, abs=1e-12)
    assert step(1.0) - step(0.0) == pytest.approx(math.sqrt(variance), abs=1e-12)


def test_noise_is_asked_once_a_step_but_not_for_the_last() -> None:
    asked = []

    def noise(step: int, like: Tensor) -> Tensor:
        asked.append(step)
        return torch.zeros_like(like)

    s.euler_ancestral(problem_g, START, sigma_grid(5), noise=noise)
    assert asked == [0, 1, 2, 3]


@pytest.mark.parametrize("name", ON_THE_GRID)
def test_callback_sees_each_step_before_it_moves(name: str) -> None:
    states: list[StepState] = []
    grid = sigma_grid(5, 2.0)
    noise = generator_noise(torch.Generator().manual_seed(0))
    SOLVERS[name](problem_g, START, grid, callback=states.append, noise=noise)
    assert [state.step for state in states] == list(range(5))
    assert {state.num_steps for state in states} == {5}
    assert [state.sigma for state in states] == grid[:-1].tolist()
    assert [state.sigma_next for state in states] == grid[1:].tolist()
    assert torch.equal(states[0].x, START)
    for state in states:
        assert_close(state.velocity, problem_g(state.x, torch.full((2,), state.sigma, dtype=torch.float64)))
        assert_close(state.denoised, state.x - state.sigma * state.velocity)


def test_the_callers_own_error_comes_through_unchanged() -> None:
    class Stop(Exception):  # noqa: N818 - a signal, not a fault
        pass

    def callback(state: StepState) -> None:
        if state.step == 2:
            raise Stop

    counted = Counted(problem_g)
    with pytest.raises(Stop):
        s.euler(counted, START, sigma_grid(5), callback=callback)
    assert len(counted.levels) == 3


@pytest.mark.parametrize("name", SOLVERS)
def test_state_is_float32_for_half_precision_and_the_result_is_cast_back(name: str) -> None:
    seen = set()

    def velocity(x: Tensor, sigma: Tensor) -> Tensor:
        seen.add((x.dtype, sigma.dtype, sigma.shape))
        return (-x).to(torch.bfloat16)

    noise = generator_noise(torch.Generator().manual_seed(0))
    start = START.to(torch.bfloat16)
    end = SOLVERS[name](velocity, start, sigma_grid(4), noise=noise)
    assert end.dtype is torch.bfloat16
    assert seen == {(torch.float32, torch.float32, (2,))}


def test_the_start_is_not_changed() -> None:
    start = START.clone()
    for solver in FIXED.values():
        solver(problem_g, start, sigma_grid(3))
    assert torch.equal(start, START)


def test_gradients_flow_through_a_run() -> None:
    start = START.clone().requires_grad_()
    s.heun(problem_g, start, uniform_grid(8)).sum().backward()
    assert start.grad is not None
    assert (start.grad != 0).all()


def test_image_to_image_from_the_exact_path_comes_back() -> None:
    clean = row(1.0, -2.0, 0.5, 3.0).expand(2, 4)
    grid = sigma_grid(4, strength=0.5)
    noised = interpolate(clean, START, grid[:1].expand(2)).noised

    def velocity(_x: Tensor, _sigma: Tensor) -> Tensor:
        return START - clean

    assert_close(s.euler(velocity, noised, grid), clean)


def test_bad_grids() -> None:
    for sigmas in (row(0.5), row(0.5, 0.2)[None]):
        with pytest.raises(ConfigError, match="sigmas must be one row of at least 2 levels, got shape"):
            s.euler(problem_g, START, sigmas)
    for sigmas in (row(1.5, 0.0), row(1.0, math.nan), row(0.5, -0.1)):
        with pytest.raises(ConfigError, match=r"sigmas must lie in \[0, 1\], got"):
            s.euler(problem_g, START, sigmas)
    with pytest.raises(
        ConfigError, match=r"sigmas must fall \(or rise, for inversion\) at .*, got 0\.5 before 0\.5"
    ):
        s.euler(problem_g, START, row(1.0, 0.5, 0.5, 0.0))
    for solver in (s.ddim, s.euler_ancestral, s.dpmpp_2m):
        with pytest.raises(ConfigError, match=r"sigmas must fall at every step, got 0\.1 before 0\.5"):
            solver(problem_g, START, row(0.1, 0.5))


def test_bad_options() -> None:
    grid = sigma_grid(3)
    for solver in (s.ddim, s.euler_ancestral):
        with pytest.raises(ConfigError, match=r"eta must lie in \[0, 1\], got 1\.5"):
            solver(problem_g, START, grid, eta=1.5)
        with pytest.raises(ConfigError, match="noise must be given to a solver that adds noise, got None"):
            solver(problem_g, START, grid, eta=0.5)
        with pytest.raises(ShapeError, match=r"noise must have the shape of x \(2, 4\), got \(1,\)"):
            solver(problem_g, START, grid, eta=0.5, noise=lambda *_: torch.zeros(1))
    with pytest.raises(ConfigError, match="lambda_kind must be log_t or logsnr, got 'log'"):
        s.dpmpp_2m(problem_g, START, grid, lambda_kind="log")
    for solver in (s.heun, s.rk4, rk.dopri5_fixed, rk.dopri5):
        with pytest.raises(ConfigError, match="final_step must be euler or full, got 'half'"):
            solver(problem_g, START, grid, final_step="half")


def test_bad_tensors() -> None:
    with pytest.raises(ShapeError, match=r"velocity must have the shape of x \(2, 4\), got \(2, 3\)"):
        s.euler(lambda x, _: x[:, :3], START, sigma_grid(3))
    with pytest.raises(
        ShapeError, match=r"state must be a floating-point tensor with a batch axis, got torch\.int64"
    ):
        s.euler(problem_g, START.long(), sigma_grid(3))


@pytest.mark.parametrize("name", ON_THE_GRID)
def test_no_step_reads_a_value_of_the_state(name: str) -> None:
    """Reading a value, for which an accelerator would be waited for, raises on tensors without data."""
    x = torch.empty(2, 4, device="meta")
    guided_velocity = guided(lambda x, _: -x, lambda x, _: x, 3.0, combine=cfg_rescale(0.5))
    velocity = masked_velocity(guided_velocity, torch.ones(1), x, x)
    noise = generator_noise(torch.Generator().manual_seed(0))
    assert SOLVERS[name](velocity, x, sigma_grid(4), noise=noise).shape == (2, 4)
