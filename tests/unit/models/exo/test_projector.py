"""Exo's projector: from visual tokens to features on latents, resized or by an upscaling that it learns."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from flowcore.models.exo import PRESETS
from flowcore.models.exo.memory import Projector
from flowcore.ops import TORCH_OPS


def projector(upscale: int) -> Projector:
    torch.manual_seed(0)
    return Projector(replace(PRESETS["tiny"], projector_upscale=upscale), ops=TORCH_OPS)


def tokens(rows: int, columns: int) -> torch.Tensor:
    return torch.randn(2, rows * columns, 64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("upscale", [1, 2, 4])
@pytest.mark.parametrize("size", [(8, 12), (7, 9), (2, 3)])
def test_features_lie_on_the_latents(upscale: int, size: tuple[int, int]) -> None:
    features = projector(upscale)(tokens(2, 3), (2, 3), size)
    assert features.shape == (2, 8, *size)
    assert projector(upscale).latents(features).shape == (2, 16, *size)


def test_an_upscaled_token_gives_each_of_its_latents_features_of_its_own() -> None:
    made = projector(4)
    torch.nn.init.zeros_(made.conv3.weight)
    torch.nn.init.zeros_(made.conv3.bias)
    read: list[torch.Tensor] = []
    made.conv2.register_forward_hook(lambda _module, _inputs, output: read.append(output))
    with torch.no_grad():
        features = made(tokens(2, 3), (2, 3), (8, 12))
    wide = functional.gelu(read[0])
    assert wide.shape == (2, 8 * 16, 2, 3)
    for row, column in ((0, 0), (5, 7), (7, 11)):
        place = 4 * (row % 4) + column % 4
        assert torch.equal(features[:, :, row, column], wide[:, place::16, row // 4, column // 4])


def test_without_upscaling_latents_between_tokens_are_their_mean() -> None:
    made = projector(1)
    torch.nn.init.zeros_(made.conv3.weight)
    torch.nn.init.zeros_(made.conv3.bias)
    with torch.no_grad():
        few, many = (made(tokens(1, 2), (1, 2), size) for size in ((1, 2), (1, 4)))
    assert torch.allclose(many[..., 1:3].mean(dim=-1), few.mean(dim=-1), atol=1e-6)
