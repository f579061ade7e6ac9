import pytest
import torch
from torch.testing import assert_close

from flowcore.errors import ShapeError
from flowcore.flow import path


def tensors(*shape: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    clean, noise = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    return clean, noise, torch.linspace(0.1, 0.9, shape[0], dtype=torch.float64)


def test_a_hand_computed_point() -> None:
    sample = path.interpolate(torch.tensor([[4.0]]), torch.tensor([[8.0]]), torch.tensor([0.25]))
    assert sample.noised.item() == 5.0
    assert sample.velocity.item() == 4.0


@pytest.mark.parametrize("shape", [(3,), (3, 5), (3, 4, 2, 6), (3, 2, 2, 3, 5)])
def test_round_trips(shape: tuple[int, ...]) -> None:
    clean, noise, sigma = tensors(*shape)
    sample = path.interpolate(clean, noise, sigma)
    denoised = path.velocity_to_denoised(sample.velocity, sample.noised, sigma)
    noise_back = path.velocity_to_noise(sample.velocity, sample.noised, sigma)
    assert_close(denoised, clean)
    assert_close(noise_back, noise)
    assert_close(path.denoised_to_velocity(denoised, sample.noised, sigma), sample.velocity)
    assert_close(path.noise_to_velocity(noise_back, sample.noised, sigma), sample.velocity)


def test_ends_of_the_path_are_exact() -> None:
    clean, noise, _ = tensors(2, 3)
    ends = path.interpolate(clean, noise, torch.tensor([0.0, 1.0]))
    assert torch.equal(ends.noised[0], clean[0])
    assert torch.equal(ends.noised[1], noise[1])


def test_score_is_the_gradient_of_the_log_density() -> None:
    mean, sigma = 0.7, torch.tensor([0.4], dtype=torch.float64)
    x = torch.tensor([[1.3]], dtype=torch.float64, requires_grad=True)
    log_density = -((x - (1 - sigma) * mean) ** 2) / (2 * sigma**2)
    (expected,) = torch.autograd.grad(log_density.sum(), x)
    velocity = (x.detach() - mean) / sigma
    assert_close(path.velocity_to_score(velocity, x.detach(), sigma), expected)


def test_half_precision_is_computed_in_float32_and_cast_back() -> None:
    clean, noise, sigma = (part.to(torch.bfloat16) for part in tensors(3, 64))
    level = sigma.float()
    sample = path.interpolate(clean, noise, level)
    exact = (1 - level[:, None]) * clean.float() + level[:, None] * noise.float()
    assert sample.noised.dtype is torch.bfloat16
    assert torch.equal(sample.noised, exact.to(torch.bfloat16))


def test_gradients_flow_to_the_velocity() -> None:
    clean, noise, sigma = tensors(3, 4)
    velocity = (noise - clean).requires_grad_()
    path.velocity_to_denoised(velocity, noise, sigma).sum().backward()
    assert_close(velocity.grad, -sigma[:, None].expand(3, 4))


def test_data_time_is_its_own_inverse_and_gives_the_same_velocity() -> None:
    clean, noise, sigma = tensors(3, 4)
    velocity, time = path.to_data_time(noise - clean, sigma)
    assert_close(velocity, clean - noise)
    back, level = path.to_data_time(velocity, time)
    assert_close(back, noise - clean)
    assert_close(level, sigma)

    def network(x: torch.Tensor, data_time: torch.Tensor) -> torch.Tensor:
        return x * data_time[:, None]

    assert_close(path.from_data_time(network)(clean, sigma), -clean * (1 - sigma[:, None]))


def test_offset_noise_moves_whole_channels() -> None:
    noise = torch.zeros(2, 3, 4, 5)
    moved = path.offset_noise(noise, 0.5, torch.Generator().manual_seed(0))
    assert torch.equal(moved, moved[:, :, :1, :1].expand_as(moved))
    assert moved[:, :, 0, 0].unique().numel() == 6
    assert torch.equal(path.offset_noise(noise, 0.0, torch.Generator()), noise)


def test_errors() -> None:
    clean, _, sigma = tensors(3, 4)
    with pytest.raises(ShapeError, match=r"noise must have the shape of clean \(3, 4\), got \(3, 5\)"):
        path.interpolate(clean, torch.zeros(3, 5), sigma)
    with pytest.raises(ShapeError, match=r"sigma must hold one number per sample \(3\), got \(2,\)"):
        path.interpolate(clean, clean, sigma[:2])
    with pytest.raises(ShapeError, match="sigma must hold"):
        path.velocity_to_noise(clean, clean, sigma[:, None])
