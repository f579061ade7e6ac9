"""Position grids, crops, the camera, and maps at latent resolution."""

import math

import pytest
import torch

from flowcore.errors import ShapeError
from flowcore.models.xut.positions import (
    axial_positions,
    camera_positions,
    cropped_positions,
    log_aspect,
    pool_positions,
)


def test_longer_side_spans_the_range() -> None:
    wide = axial_positions(2, 4)
    assert wide[:, 1].unique().tolist() == [-0.75, -0.25, 0.25, 0.75]
    assert wide[:, 0].unique().tolist() == [-0.25, 0.25]
    assert torch.equal(
        axial_positions(4, 2), torch.stack([wide[:, 1].view(2, 4).T, wide[:, 0].view(2, 4).T], -1).view(8, 2)
    )


def test_rows_come_first_and_corners_may_be_aligned() -> None:
    grid = axial_positions(3, 3, align_corners=True)
    assert grid[:4].tolist() == [[-1, -1], [-1, 0], [-1, 1], [0, -1]]


def test_crop_keeps_its_place() -> None:
    whole = axial_positions(6, 4).view(6, 4, 2)
    assert torch.equal(cropped_positions(2, 0, 6, 4).view(4, 4, 2), whole[2:6])


def test_neutral_camera_is_the_grid_of_padded_latents() -> None:
    assert torch.equal(camera_positions(7, 5), axial_positions(8, 6)[None])
    moved = camera_positions(8, 6, zoom=2.0, x_shift=0.5, y_shift=-0.25)
    assert torch.allclose(moved[0], (axial_positions(8, 6) + torch.tensor([-0.25, 0.5])) / 2)
    with pytest.raises(ShapeError, match="zoom must be above 0"):
        camera_positions(8, 8, zoom=0.0)


def test_pooled_map_equals_the_token_grid_inside_and_moves_in_at_the_border() -> None:
    pooled = pool_positions(axial_positions(32, 32)[None], 16, 16, 2).view(16, 16, 2)
    tokens = axial_positions(16, 16).view(16, 16, 2)
    assert torch.allclose(pooled[1:-1, 1:-1], tokens[1:-1, 1:-1], atol=1e-6)
    assert tokens[0, 0, 0].item() == pytest.approx(-0.9375)
    assert pooled[0, 0, 0].item() == pytest.approx(-0.9375 + 3 / 28 * 0.125)


def test_log_aspect() -> None:
    assert log_aspect(10, 20).tolist() == pytest.approx([math.log(2)])
