"""Rotations keep lengths, depend on relative positions, and leave spare channels alone."""

import pytest
import torch

from flowcore.layers.rope import Rotation, axial_angles, rotate_pairs, rotation
from tests.support import FORWARD_LIMIT, assert_close


def test_quarter_turn() -> None:
    turned = rotate_pairs(
        torch.tensor([[[[1.0, 0.0, 0.0, 2.0]]]]), rotation(torch.full((1, 1, 1, 2), torch.pi / 2))
    )
    assert torch.allclose(turned, torch.tensor([0.0, 1.0, -2.0, 0.0]), atol=1e-6)


def test_pair_numbers_alternate_between_axes() -> None:
    frequencies = torch.tensor([[[1.0, 10.0], [2.0, 20.0]]])  # one head, two frequencies, two axes
    angles = axial_angles(torch.tensor([[[0.5, 0.25]]]), frequencies)
    assert angles.flatten().tolist() == [0.5, 2.5, 1.0, 5.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lengths_are_kept_and_spare_channels_pass(dtype: torch.dtype) -> None:
    x = torch.randn(2, 3, 5, 10).to(dtype)
    turned = rotate_pairs(x, rotation(torch.randn(1, 3, 5, 4)))
    assert turned.dtype == dtype
    assert torch.equal(turned[..., 8:], x[..., 8:])
    assert_close(
        turned.float().norm(dim=-1), x.float().norm(dim=-1), limit=1e-4 if dtype == torch.float32 else 0.05
    )


def test_products_depend_on_relative_positions() -> None:
    q, k = torch.randn(1, 2, 4, 8), torch.randn(1, 2, 4, 8)
    frequencies = torch.rand(2, 2, 2) * 3
    positions = torch.randn(1, 4, 2)

    def products(shift: float) -> torch.Tensor:
        by = rotation(axial_angles(positions + shift, frequencies))
        return rotate_pairs(q, by) @ rotate_pairs(k, by).mT

    assert_close(products(1.5), products(0.0), limit=FORWARD_LIMIT)
    assert not torch.allclose(products(0.0), q @ k.mT, atol=1e-2)


def test_complex_and_real_products_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    x, by = torch.randn(2, 3, 5, 8), rotation(torch.randn(1, 3, 5, 4))
    fast = rotate_pairs(x, by)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert_close(rotate_pairs(x, by), fast, limit=FORWARD_LIMIT)
    assert isinstance(by, Rotation)
