"""Tiles: placing, fading, the autoencoder's own error at the seams, memory, and sizes that are not cut."""

import sys
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.testing import assert_close

from flowcore.errors import ConfigError
from flowcore.images import image_to_tensor
from flowcore.vae.autoencoder import Autoencoder, build_autoencoder, load_vae
from flowcore.vae.latent_spec import LATENT_SPECS
from flowcore.vae.tiling import OVERLAP, Tiling, _starts, in_tiles
from tests.support import run_python
from training.scenes import draw, iterate_scenes

MIN_DECIBELS, MAX_LOSS = 40.0, 0.5  # measured: 42.1 and 0.3
ALWAYS = Tiling(side=128, above=0)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def doubled(latents: Tensor) -> Tensor:
    """A decoder that sees one cell around each: nearest twice as large, then a kernel of 3."""
    kernel = random(2, latents.shape[1], 3, 3, seed=1)
    return functional.conv2d(latents.repeat_interleave(2, 2).repeat_interleave(2, 3), kernel, padding=1)


def halved(images: Tensor) -> Tensor:
    """An encoder that sees two pixels around each cell."""
    return functional.conv2d(images, random(2, images.shape[1], 4, 4, seed=2), padding=1, stride=2)


@pytest.mark.parametrize("side", [1, 8, 9, 13, 14, 15, 20, 21, 100, 257])
@pytest.mark.parametrize("cells", [8, 16])
def test_tiles_cover_an_axis_and_overlap_enough(side: int, cells: int) -> None:
    starts = _starts(side, cells)
    assert starts[0] == 0
    assert starts[-1] + cells >= side
    assert all(0 < second - first <= cells - cells // OVERLAP for first, second in pairwise(starts))
    assert len(starts) == 1 or starts[-1] + cells == side


@pytest.mark.parametrize(("rows", "columns"), [(8, 30), (23, 17), (30, 8), (41, 5)])
def test_what_depends_on_no_neighbour_is_the_same_in_tiles(rows: int, columns: int) -> None:
    latents = random(2, 3, rows, columns)
    pixels = latents.repeat_interleave(4, 2).repeat_interleave(4, 3)
    calls: list[tuple[int, int]] = []
    result = in_tiles(
        lambda part: part.repeat_interleave(4, 2).repeat_interleave(4, 3),
        latents,
        cells=8,
        after=4,
        callback=lambda done, total: calls.append((done, total)),
    )
    assert_close(result, pixels, atol=1e-6, rtol=0)
    assert calls == [(number, calls[-1][1]) for number in range(1, calls[-1][1] + 1)]
    assert len(calls) > 1
    assert_close(
        in_tiles(lambda part: part[:, :, ::4, ::4], pixels, cells=8, before=4), latents, atol=1e-6, rtol=0
    )


def seams(side: int, cells: int, after: int) -> list[int]:
    """The first and the last element of every tile along an axis, but those of the picture's own."""
    starts = _starts(side, cells)
    firsts = [start * after for start in starts[1:]]
    return firsts + [(start + cells) * after - 1 for start in starts[:-1]]


def test_what_depends_on_neighbours_differs_at_seams_alone() -> None:
    latents, cells = random(1, 3, 20, 31), 8
    expected = doubled(latents)
    difference = (in_tiles(doubled, latents, cells=cells, after=2) - expected).abs()
    # There a tile has an eighth of the weight: its zeros in place of the neighbours fade out.
    assert 0.01 < float(difference.max() / expected.std()) < 0.7
    difference[:, :, seams(20, cells, 2)] = 0
    difference[:, :, :, seams(31, cells, 2)] = 0
    assert float(difference.max()) < 1e-5


def test_an_encoder_that_sees_neighbours_differs_at_seams_alone() -> None:
    images, cells = random(1, 3, 40, 62), 8
    expected = halved(images)
    difference = (in_tiles(halved, images, cells=cells, before=2) - expected).abs()
    assert 0.01 < float(difference.max() / expected.std()) < 1
    difference[:, :, seams(20, cells, 1)] = 0
    difference[:, :, :, seams(31, cells, 1)] = 0
    assert float(difference.max()) < 1e-5


def test_a_picture_of_one_tile_is_exactly_the_whole_one() -> None:
    latents = random(1, 3, 7, 8)
    assert torch.equal(in_tiles(doubled, latents, cells=8, after=2), doubled(latents))


@pytest.mark.parametrize(
    ("tiling", "size", "cells"),
    [
        (Tiling(), (1024, 1024), None),
        (Tiling(), (1024, 2048), None),
        (Tiling(), (1040, 2048), 64),
        (Tiling(side=0, above=0), (4096, 4096), None),
        (ALWAYS, (128, 128), None),
        (ALWAYS, (64, 136), 16),
    ],
)
def test_which_pictures_are_cut(tiling: Tiling, size: tuple[int, int], cells: int | None) -> None:
    assert tiling.cells(*size, 8) == cells


@pytest.mark.parametrize("side", [64, 100, -128])
def test_sides_that_cannot_be_tiles_are_named(side: int) -> None:
    with pytest.raises(ConfigError, match=rf"must be 0 or a multiple of 64 from 128 on, got {side}"):
        Tiling(side=side)


def decibels(result: Tensor, expected: Tensor) -> float:
    return float(-10 * ((result - expected) / 2).square().mean().log10())


def test_the_bundled_autoencoder_in_tiles_is_near_the_whole_one() -> None:
    """Norms and attention see one tile, so that no pixel is quite the same."""
    scenes = iterate_scenes(6, 2024, objects="mixed", split="test")
    row = [image_to_tensor(draw(scene, 128), 128, 128) for scene, _ in scenes]
    images = torch.cat([torch.cat(row[:3], dim=3), torch.cat(row[3:], dim=3)], dim=2)
    vae = load_vae("scenes-vae")
    latents = vae.encode(images)
    expected = vae.decode(latents)
    vae.tiling = Tiling(side=256, above=0)
    tiles: list[tuple[int, int]] = []
    vae.on_tile = lambda done, total: tiles.append((done, total))
    found = vae.decode(latents)
    assert tiles == [(1, 2), (2, 2)]
    assert decibels(found, expected) > MIN_DECIBELS
    assert decibels(vae.decode(vae.encode(images)), images) > decibels(expected, images) - MAX_LOSS
    assert len(tiles) == 6


def test_sampling_in_tiles_repeats_and_is_no_mode() -> None:
    torch.manual_seed(0)
    config = {"block_out_channels": [8] * 4, "norm_num_groups": 4, "layers_per_block": 1}
    kinds = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    vae = Autoencoder(build_autoencoder({**config, **kinds}), LATENT_SPECS["sd15"], tiling=ALWAYS)
    images = random(2, 3, 136, 64).clamp(-1, 1)
    first, second = (vae.encode(images, generator=torch.Generator().manual_seed(7)) for _ in range(2))
    assert first.shape == (2, 4, 17, 8)
    assert torch.equal(first, second)
    assert not torch.allclose(first, vae.encode(images))


MEASURE = """
import sys, torch
from flowcore.vae.autoencoder import Autoencoder, build_autoencoder
from flowcore.vae.latent_spec import LATENT_SPECS
from flowcore.vae.tiling import Tiling

def kibibytes(field):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(field))

torch.manual_seed(0)
config = {"block_out_channels": [16] * 4, "norm_num_groups": 4, "layers_per_block": 1}
kinds = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
vae = Autoencoder(build_autoencoder({**config, **kinds}), LATENT_SPECS["sd15"])

def peak(tile, side):
    vae.tiling = Tiling(side=tile, above=0)
    with torch.inference_mode():
        vae.decode(vae.encode(torch.zeros(1, 3, 128, 128)))  # whatever the first call sets up
        latents, images = torch.zeros(1, 4, side // 8, side // 8), torch.zeros(1, 3, side, side)
        latents += 1
        images += 1
        before = kibibytes("VmRSS")
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # the peak counts from here
        result = vae.decode(latents) if sys.argv[1] == "decode" else vae.encode(images)
    return (kibibytes("VmHWM") - before) / 1024

print(peak(128, 512), peak(128, 768), peak(0, 512))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("what", ["decode", "encode"])
def test_memory_is_that_of_a_tile_and_the_result(what: str) -> None:
    """Mebibytes by which the process grows at most."""
    result = run_python("-c", MEASURE, what, timeout=900, OMP_NUM_THREADS="1")
    assert result.returncode == 0, result.stderr
    tiled, larger, whole = map(float, result.stdout.split())
    image = 3 * 4 * 512**2 / 2**20 if what == "decode" else 0
    assert whole > 50, (tiled, larger, whole)
    assert tiled - image < whole / 4, (tiled, larger, whole)
    # More than twice the pixels: the result grows, the work does not.
    assert larger - tiled < 1.25 * image + 8, (tiled, larger, whole)
