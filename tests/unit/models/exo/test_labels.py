import pytest
import torch

from flowcore.errors import ShapeError
from flowcore.models.exo.labels import cell_distances, changed_cells


def test_distances_are_means_over_channels_and_the_latents_of_a_cell() -> None:
    source = torch.zeros(1, 2, 4, 6)
    target = source.clone()
    target[0, 1, 2, 5] = 4.0
    expected = torch.zeros(1, 2, 3)
    expected[0, 1, 2] = 16 / 8
    assert torch.equal(cell_distances(source, target), expected)


def test_cells_are_changed_above_half_the_weight() -> None:
    source = torch.zeros(1, 1, 2, 6)
    target = source.clone()
    target[..., 2:4] = 0.05**0.5 - 1e-3
    target[..., 4:6] = 0.05**0.5 + 1e-3
    assert changed_cells(source, target).tolist() == [[[False, False, True]]]
    assert changed_cells(source, target, weight=0.2).sum() == 0


def test_cells_at_the_edge_of_an_odd_grid_count_what_is_there() -> None:
    source = torch.zeros(1, 1, 3, 5)
    target = torch.full_like(source, 0.5)
    assert torch.allclose(cell_distances(source, target), torch.full((1, 2, 3), 0.25))


def test_latents_of_two_shapes_are_refused() -> None:
    with pytest.raises(ShapeError, match="must be `b c h w` of one shape"):
        cell_distances(torch.zeros(1, 4, 2, 2), torch.zeros(1, 4, 2, 4))
