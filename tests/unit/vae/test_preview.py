"""The linear preview: a known map is found again, and shapes that do not fit are named."""

import pytest
import torch

from flowcore.errors import ShapeError
from flowcore.vae.preview import fit_rgb_factors


def test_a_linear_map_is_recovered() -> None:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(4, 5, 6, 7, generator=generator)
    factors = torch.randn(5, 3, generator=generator)
    bias = torch.tensor([0.1, -0.2, 0.3])
    small = torch.einsum("bchw,cr->brhw", latents, factors) + bias.view(1, 3, 1, 1)
    images = small.repeat_interleave(8, dim=2).repeat_interleave(8, dim=3)
    found, found_bias = fit_rgb_factors(latents, images)
    assert torch.allclose(torch.tensor(found), factors, atol=2e-5)
    assert torch.allclose(torch.tensor(found_bias), bias, atol=2e-5)


def test_other_shapes_are_named() -> None:
    with pytest.raises(ShapeError, match=r"latents and images must be .* got \(1, 4, 2, 2\)"):
        fit_rgb_factors(torch.zeros(1, 4, 2, 2), torch.zeros(2, 3, 16, 16))
    with pytest.raises(ShapeError, match="more than the 4 channels, got 4"):
        fit_rgb_factors(torch.zeros(1, 4, 2, 2), torch.zeros(1, 3, 16, 16))
