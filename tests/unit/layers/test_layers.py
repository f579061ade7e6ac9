"""Norms, embeddings, modulation and patches."""

import pytest
import torch

from flowcore.layers.embeddings import sinusoidal, timestep_frequencies
from flowcore.layers.modulation import modulation
from flowcore.layers.norm import rms_norm
from flowcore.layers.patch import pad_to_multiple, unpatchify


def test_rms_norm_in_float32() -> None:
    x = torch.tensor([[3.0, 4.0]], dtype=torch.float16)
    normed = rms_norm(x, eps=0.0)
    assert normed.dtype == torch.float32
    assert torch.allclose(normed, torch.tensor([[3.0, 4.0]]) / 12.5**0.5)


@pytest.mark.parametrize("dim", [6, 7])
def test_sinusoidal_has_cosines_first(dim: int) -> None:
    vector = sinusoidal(torch.tensor([0.0, 2.0]), dim)
    assert vector.shape == (2, dim)
    assert vector[0].tolist() == [1.0] * 3 + [0.0] * (dim - 3)
    assert vector[1, 0].item() == pytest.approx(torch.cos(torch.tensor(2.0)).item())
    frequencies = timestep_frequencies(dim)[0].tolist()
    assert frequencies == pytest.approx([1.0, 1e4 ** (-1 / 3), 1e4 ** (-2 / 3)])


def test_modulation_adds_the_offsets() -> None:
    triple = modulation(torch.tensor([[[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]]]).half())
    assert [part.flatten().tolist() for part in triple] == [[2, 3], [3, 4], [6, 7]]
    assert triple.scale.dtype == torch.float32


def test_padding_repeats_from_the_start() -> None:
    x = torch.arange(6.0).view(1, 1, 2, 3)
    padded = pad_to_multiple(x, 4)
    assert padded[0, 0].tolist() == [[0, 1, 2, 0], [3, 4, 5, 3], [0, 1, 2, 0], [3, 4, 5, 3]]
    assert pad_to_multiple(x, 1) is x


def test_unpatchify_undoes_cutting_into_patches() -> None:
    image = torch.randn(2, 3, 4, 6)
    patches = torch.stack(
        [
            image[:, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2].permute(0, 2, 3, 1).flatten(1)
            for row in range(2)
            for column in range(3)
        ],
        dim=1,
    )
    assert torch.equal(unpatchify(patches, 2, 3, 2), image)
