import torch
from torch.testing import assert_close

from flowcore.flow import path
from flowcore.flow import variance_preserving as vp

SIGMA = torch.tensor([0.05, 0.4, 0.97], dtype=torch.float64)


def both() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(3, 2, 4, generator=generator, dtype=torch.float64) for _ in range(2))


def weights() -> tuple[torch.Tensor, torch.Tensor]:
    alpha_bar = vp.sigma_to_alpha_bar(SIGMA)[:, None, None]
    return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()


def test_levels_round_trip_and_keep_the_signal_to_noise_ratio() -> None:
    alpha_bar = vp.sigma_to_alpha_bar(SIGMA)
    assert_close(vp.alpha_bar_to_sigma(alpha_bar), SIGMA)
    assert_close(alpha_bar / (1 - alpha_bar), ((1 - SIGMA) / SIGMA) ** 2)


def test_points_of_both_paths_stand_for_each_other() -> None:
    clean, noise = both()
    signal, spread = weights()
    noised = path.interpolate(clean, noise, SIGMA).noised
    assert_close(vp.noised_to_vp(noised, SIGMA), signal * clean + spread * noise)
    assert_close(vp.vp_to_noised(vp.noised_to_vp(noised, SIGMA), SIGMA), noised)


def test_perfect_teachers_give_the_true_velocity() -> None:
    clean, noise = both()
    signal, spread = weights()
    point = signal * clean + spread * noise
    assert_close(vp.vp_noise_to_velocity(noise, point, SIGMA), noise - clean)
    assert_close(vp.vp_velocity_to_velocity(signal * noise - spread * clean, point, SIGMA), noise - clean)


def test_v_prediction_round_trip() -> None:
    clean, noise = both()
    noised = path.interpolate(clean, noise, SIGMA).noised
    predicted = torch.cos(noised)
    there = vp.velocity_to_vp_velocity(predicted, noised, SIGMA)
    assert_close(vp.vp_velocity_to_velocity(there, vp.noised_to_vp(noised, SIGMA), SIGMA), predicted)


def test_index_of_a_table_entry_is_its_position() -> None:
    table = vp.scaled_linear_alpha_bar()
    assert table.shape == (1000,)
    assert abs(table[0].item() - (1 - 0.00085)) < 1e-12
    levels = vp.alpha_bar_to_sigma(table)
    assert_close(vp.sigma_to_index(levels, table), torch.arange(1000, dtype=torch.float64))
    between = torch.sigmoid((torch.logit(levels[499]) + torch.logit(levels[500])) / 2)
    assert_close(vp.sigma_to_index(between[None], table), torch.tensor([499.5], dtype=torch.float64))
    outside = vp.sigma_to_index(torch.tensor([1e-6, 1 - 1e-6]), table)
    assert outside.tolist() == [0.0, 999.0]
