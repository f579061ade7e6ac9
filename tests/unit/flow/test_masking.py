from functools import partial

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from flowcore.errors import ConfigError, ShapeError
from flowcore.flow import (
    SOLVERS,
    generator_noise,
    guided,
    interpolate,
    invert,
    masked_velocity,
    noise_to_strength,
    restore_kept,
    sigma_grid,
)
from flowcore.flow.solvers import ddim, dpmpp_2m, euler, heun, rk4

from .problems import START, problem_g, problem_m, row, solution_g

SHAPE = (2, 3, 4, 5)


def images() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    clean, noise = (torch.randn(SHAPE, generator=generator, dtype=torch.float64) for _ in range(2))
    mask = torch.zeros(2, 1, 4, 5, dtype=torch.float64)
    mask[..., :2] = 1
    return clean, noise, mask


def network(x: Tensor, sigma: Tensor) -> Tensor:
    """A smooth velocity in which every element depends on all others."""
    level = sigma[:, None, None, None]
    return torch.sin(x) + level * x.mean((1, 2, 3), keepdim=True)


RUNS = {
    **SOLVERS,
    "ddim with noise": partial(ddim, eta=1.0),
    "heun full": partial(heun, final_step="full"),
    "rk4 full": partial(rk4, final_step="full"),
    "dpmpp_2m logsnr": partial(dpmpp_2m, lambda_kind="logsnr"),
}


@pytest.mark.parametrize("strength", [1.0, 0.5])
@pytest.mark.parametrize("name", RUNS)
def test_the_kept_part_ends_at_the_source(name: str, strength: float) -> None:
    clean, noise, mask = images()
    sigmas = sigma_grid(6, 1.5, strength=strength)
    velocity = masked_velocity(network, mask, clean, noise)
    start = noise_to_strength(clean, noise, sigmas)
    extra = generator_noise(torch.Generator().manual_seed(1))
    end = RUNS[name](velocity, start, sigmas, noise=extra)
    assert_close(end[..., 2:], clean[..., 2:], rtol=0, atol=1e-12)
    assert (end[..., :2] - clean[..., :2]).abs().mean() > 0.05
    restored = restore_kept(end, mask, clean)
    assert torch.equal(restored[..., 2:], clean[..., 2:])
    assert torch.equal(restored[..., :2], end[..., :2])


def test_the_network_sees_the_kept_part_on_its_path() -> None:
    clean, noise, mask = images()
    sigma = torch.tensor([0.7, 0.2], dtype=torch.float64)
    seen = []

    def watched(x: Tensor, sigma: Tensor) -> Tensor:
        seen.append(x)
        return network(x, sigma)

    x = torch.full(SHAPE, 9.0, dtype=torch.float64)
    masked_velocity(watched, mask, clean, noise)(x, sigma)
    assert_close(seen[0][..., 2:], interpolate(clean, noise, sigma).noised[..., 2:])
    assert torch.equal(seen[0][..., :2], x[..., :2])


def test_a_soft_mask_follows_the_blend_of_estimates() -> None:
    clean, noise, _ = images()
    mask = torch.rand(1, 1, 4, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    sigma = torch.tensor([0.7, 0.2], dtype=torch.float64)
    level = sigma[:, None, None, None]
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    blended = mask * x + (1 - mask) * ((1 - level) * clean + level * noise)
    denoised = mask * (blended - level * network(blended, sigma)) + (1 - mask) * clean
    assert_close(masked_velocity(network, mask, clean, noise)(x, sigma), (x - denoised) / level)


def test_masks_of_ones_and_zeros() -> None:
    clean, noise, _ = images()
    sigmas = sigma_grid(5)
    everything = masked_velocity(network, torch.ones(1), clean, noise)
    assert_close(euler(everything, noise, sigmas), euler(network, noise, sigmas))
    nothing = masked_velocity(network, torch.zeros(1), clean, noise)
    assert_close(euler(nothing, noise, sigmas), clean)


def test_a_mask_goes_around_guidance_and_may_be_boolean_and_half() -> None:
    clean, noise, mask = images()
    clean, noise = clean.to(torch.bfloat16), noise.to(torch.bfloat16)
    velocity = masked_velocity(guided(network, lambda x, _: -x, 3.0), mask.bool(), clean, noise)
    end = euler(velocity, noise, sigma_grid(5))
    assert end.dtype is torch.bfloat16
    assert_close(end[..., 2:], clean[..., 2:])


def test_strength_start() -> None:
    clean, noise, _ = images()
    assert torch.equal(noise_to_strength(clean, noise, sigma_grid(5)), noise)
    half = noise_to_strength(clean, noise, sigma_grid(5, strength=0.5))
    assert_close(half, (clean + noise) / 2)


@pytest.mark.parametrize(
    "name", ["euler", "midpoint", "heun", "rk4", "ab2", "bosh3", "dopri5", "dopri5_fixed"]
)
def test_inversion_comes_back(name: str) -> None:
    sigmas = sigma_grid(400, start=0.8)
    adaptive = {"rtol": 1e-6, "atol": 1e-7} if name in ("bosh3", "dopri5") else {}
    solver = partial(SOLVERS[name], **adaptive)
    noised = invert(problem_m, START, sigmas, solver=solver)
    tolerance = 0.1 if name == "euler" else 5e-3
    assert_close(solver(problem_m, noised, sigmas), START, rtol=0, atol=tolerance)
    assert (noised - START).abs().max() > 0.5


def test_inversion_is_the_exact_flow_upwards_and_never_asks_at_0() -> None:
    levels = []

    def watched(x: Tensor, sigma: Tensor) -> Tensor:
        levels.append(sigma.min().item())
        return problem_g(x, sigma)

    noised = invert(watched, START, sigma_grid(300, start=0.9), solver=rk4)
    assert_close(noised, solution_g(0, 0.9), rtol=1e-5, atol=1e-5)
    assert min(levels) == 1e-4


def test_errors() -> None:
    clean, noise, mask = images()
    with pytest.raises(
        ShapeError, match=r"noise must have the shape of clean \(2, 3, 4, 5\), got \(2, 3, 4, 4\)"
    ):
        masked_velocity(network, mask, clean, noise[..., :4])
    for bad in (mask[..., :3], mask[None], torch.ones(2)):
        with pytest.raises(ShapeError, match=r"mask must broadcast to the latents \(2, 3, 4, 5\), got"):
            masked_velocity(network, bad, clean, noise)
    for bad in (2 * mask, -mask, mask * torch.nan):
        with pytest.raises(ShapeError, match=r"mask must hold values in \[0, 1\], got"):
            masked_velocity(network, bad, clean, noise)
    with pytest.raises(ShapeError, match="result must have the shape of clean"):
        restore_kept(clean[:1], mask, clean)
    with pytest.raises(ShapeError, match="noise must have the shape of clean"):
        noise_to_strength(clean, noise[:1], sigma_grid(3))
    with pytest.raises(ConfigError, match=r"sigmas must fall at every step, got 0 before 0\.5"):
        invert(problem_g, START, row(1.0, 0.5, 0.0), solver=dpmpp_2m)
