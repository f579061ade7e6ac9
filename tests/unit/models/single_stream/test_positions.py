"""Turns of queries and keys by their place on the grid."""

import torch

from flowcore.models.single_stream.positions import grid_angles, joint_rotation, rotate_halves


def test_angles_count_rows_then_columns_from_the_corner() -> None:
    angles = grid_angles(2, 3, 8, 10_000.0).view(2, 3, 4)
    frequencies = torch.tensor([1.0, 0.01])
    assert torch.allclose(angles[1, 2], torch.cat((1 * frequencies, 2 * frequencies)))
    assert not angles[0, 0].any()


def test_places_keep_their_angles_on_a_larger_grid() -> None:
    small, large = grid_angles(2, 3, 8, 100.0).view(2, 3, 4), grid_angles(5, 7, 8, 100.0).view(5, 7, 4)
    assert torch.equal(large[:2, :3], small)


def test_text_is_not_turned_and_image_is_turned_by_halves() -> None:
    angles = grid_angles(2, 2, 8, 10.0)
    rotation = joint_rotation(angles, 3)
    x = torch.randn(1, 7, 2, 8)
    turned = rotate_halves(x, rotation)
    assert torch.equal(turned[:, :3], x[:, :3])
    first, second = x[0, 6, 1, :4], x[0, 6, 1, 4:]
    cos, sin = angles[3].cos(), angles[3].sin()
    expected = torch.cat((first * cos - second * sin, first * sin + second * cos))
    assert torch.allclose(turned[0, 6, 1], expected, atol=1e-6)
    assert torch.equal(rotate_halves(x[:, 3:], rotation.last(4)), turned[:, 3:])


def test_norms_are_kept_and_products_depend_on_the_distance() -> None:
    rotation = joint_rotation(grid_angles(4, 4, 8, 10.0), 0)
    q, k = torch.randn(8), torch.randn(8)
    turned_q, turned_k = (
        rotate_halves(vector.expand(1, 16, 1, 8), rotation).view(4, 4, 8) for vector in (q, k)
    )
    assert torch.allclose(turned_q.norm(dim=-1), q.norm().expand(4, 4))
    assert torch.allclose(turned_q[1, 2] @ turned_k[0, 0], turned_q[3, 3] @ turned_k[2, 1], atol=1e-5)
