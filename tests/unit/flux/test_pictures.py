"""Pictures of samples show what is in them."""

import numpy as np
import pytest
import torch
from PIL import Image

from flowcore.flux import (
    CODECS,
    Codec,
    Dct,
    Fourier,
    Patches,
    Points,
    Series,
    Symbols,
    draw_samples,
)

ALL: tuple[Codec, ...] = (
    Points(count=5, dim=1),
    Points(count=5, dim=3, is_ordered=False),
    Fourier(harmonics=2, count=9),
    Patches(patch=2, colors=3, height=4, width=6),
    Patches(patch=2, colors=16, height=4, width=4),
    Dct(patch=2, keep=2, colors=1, height=4, width=4),
    Symbols(size=4, count=6),
    Series(window=2, count=8, colors=2),
)
WHITE = (255, 255, 255)


def colors_of(image: Image.Image) -> set[tuple[int, ...]]:
    return set(map(tuple, np.asarray(image).reshape(-1, 3).tolist()))


@pytest.mark.parametrize("codec", ALL, ids=lambda codec: codec.kind)
def test_every_kind_of_sample_shows(codec: Codec) -> None:
    draw = torch.Generator().manual_seed(0)
    samples = torch.randn(2, *codec.shape, generator=draw)
    if isinstance(codec, Symbols):
        samples = torch.randint(codec.size, (2, *codec.shape), generator=draw)
    first, second = draw_samples(codec, samples, 64)
    assert first.size == second.size == (64, 64)
    assert len(colors_of(first)) > 1
    assert first.tobytes() != second.tobytes()
    assert first.tobytes() == draw_samples(codec, samples, 64)[0].tobytes()
    assert {type(codec) for codec in ALL} == set(CODECS.values())


def test_points_lie_right_and_up() -> None:
    (image,) = draw_samples(Points(count=2, dim=2), torch.tensor([[[0.0, 0.0], [1.0, 1.0]]]), 100)
    assert image.getpixel((8, 92)) != WHITE  # the origin, at the lower left
    assert image.getpixel((92, 8)) != WHITE
    assert image.getpixel((8, 8)) == image.getpixel((92, 92)) == WHITE


def test_all_samples_have_one_scale() -> None:
    small, large = torch.tensor([[0.0, 0.0], [0.5, 0.5]]), torch.tensor([[0.0, 0.0], [1.0, 1.0]])
    image, _ = draw_samples(Points(count=2, dim=2), torch.stack((small, large)), 100)
    assert image.getpixel((50, 50)) != WHITE
    assert image.getpixel((92, 8)) == WHITE


def test_pictures_keep_their_colors() -> None:
    red = torch.tensor([1.0, -1.0, -1.0])[None, :, None, None].expand(1, 3, 4, 4)
    (image,) = draw_samples(Patches(patch=2, colors=3, height=4, width=4), red, 8)
    assert colors_of(image) == {(255, 0, 0)}


def test_equal_points_are_drawn_in_the_middle() -> None:
    (image,) = draw_samples(Points(count=3, dim=2), torch.ones(1, 3, 2), 100)
    assert image.getpixel((50, 50)) != WHITE
