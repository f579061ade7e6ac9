"""Grids of latents and tokens."""

import pytest
import torch

from flowcore.errors import ShapeError
from flowcore.models.flux.packing import fill_control, grid_ids, pack, unpack


def test_packing_by_the_formula() -> None:
    """Token i * w + j holds channel 4 c + 2 pi + pj."""
    latents = torch.randn(2, 3, 4, 6)
    tokens = pack(latents)
    assert tokens.shape == (2, 6, 12)
    for i, j, c, pi, pj in torch.cartesian_prod(*(torch.arange(n) for n in (2, 3, 3, 2, 2))).tolist():
        assert torch.equal(tokens[:, i * 3 + j, 4 * c + 2 * pi + pj], latents[:, c, 2 * i + pi, 2 * j + pj])


@pytest.mark.parametrize("patch_size", [1, 2, 3])
def test_unpacking_is_the_inverse(patch_size: int) -> None:
    latents = torch.randn(2, 5, 6, 12)
    rows, columns = 6 // patch_size, 12 // patch_size
    assert torch.equal(unpack(pack(latents, patch_size), rows, columns, patch_size), latents)


def test_odd_sides_are_refused() -> None:
    with pytest.raises(ShapeError, match=r"sides in steps of 2, got \(1, 4, 5, 6\)"):
        pack(torch.zeros(1, 4, 5, 6))


def test_positions_of_a_grid() -> None:
    assert grid_ids(2, 2).tolist() == [[[0, 0, 0], [0, 0, 1], [0, 1, 0], [0, 1, 1]]]
    assert grid_ids(1, 2, index=1).tolist() == [[[1, 0, 0], [1, 0, 1]]]


def test_channels_of_fill() -> None:
    """Packed: 64 of the masked picture, then 256 of the mask, whose 8 x 8 pixels are channels."""
    masked, mask = torch.randn(1, 16, 2, 4), torch.rand(1, 1, 16, 32)
    tokens = pack(fill_control(masked, mask))
    assert tokens.shape == (1, 2, 320)
    assert torch.equal(tokens[..., :64], pack(masked))
    # Pixel (row 3, column 5) of latent (1, 2): the second token of the grid, its place pi = 1, pj = 0.
    assert tokens[0, 1, 64 + 4 * (8 * 3 + 5) + 2] == mask[0, 0, 8 + 3, 16 + 5]
    with pytest.raises(ShapeError, match=r"the mask must be \(1, 1, 16, 32\)"):
        fill_control(masked, mask[..., :8])
