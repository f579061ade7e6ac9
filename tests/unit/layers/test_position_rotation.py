"""Rotations by positions of several axes."""

import math

import torch

from flowcore.layers.rope import position_rotation, rotate_pairs

WIDTHS = (4, 6)
THETA = 100.0


def test_angles_of_every_axis() -> None:
    rotation = position_rotation(torch.tensor([[[2.0, -3.5]]]), WIDTHS, THETA)
    angles = [2.0, 2.0 * THETA**-0.5, -3.5, -3.5 * THETA ** (-1 / 3), -3.5 * THETA ** (-2 / 3)]
    assert rotation.cos.shape == (1, 1, 1, 5)
    torch.testing.assert_close(rotation.cos.flatten(), torch.tensor([math.cos(a) for a in angles]))
    torch.testing.assert_close(rotation.sin.flatten(), torch.tensor([math.sin(a) for a in angles]))


def test_first_channel_of_a_pair_turns_to_the_second() -> None:
    """cos * (1, 0) and sin * (1, 0): the sign and the pairing of the interleaved form."""
    x = torch.tensor([1.0, 0.0, 1.0, 0.0]).view(1, 1, 1, 4)
    turned = rotate_pairs(x, position_rotation(torch.tensor([[[1]]]), (4,), 100.0)).flatten()
    expected = [math.cos(1), math.sin(1), math.cos(0.1), math.sin(0.1)]
    torch.testing.assert_close(turned, torch.tensor(expected))


def test_products_depend_on_the_difference_of_positions_alone() -> None:
    q, k = torch.randn(2, 1, 1, 1, 10).unbind(0)
    places = torch.randn(1, 2, 2) * 5

    def product(shift: float) -> torch.Tensor:
        here, there = (position_rotation(places[:, i : i + 1] + shift, WIDTHS, THETA) for i in range(2))
        return (rotate_pairs(q, here) * rotate_pairs(k, there)).sum()

    torch.testing.assert_close(product(0.0), product(7.25), atol=1e-4, rtol=1e-4)
    assert rotate_pairs(q, position_rotation(places[:, :1], WIDTHS, THETA)).norm().isclose(q.norm())


def test_large_and_whole_positions_are_exact() -> None:
    """A float32 angle of 100,000 is off by 0.004."""
    rotation = position_rotation(torch.tensor([[[100_001]]]), (2,), THETA)
    assert abs(rotation.cos.item() - math.cos(100_001)) < 1e-7
    same = position_rotation(torch.tensor([[[100_001.0]]]), (2,), THETA)
    assert torch.equal(rotation.cos, same.cos)
