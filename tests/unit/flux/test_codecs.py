"""Codecs: inverses of themselves, with the positions and channels that the format of sequences states."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from flowcore.errors import CheckpointError, ConfigError, ShapeError
from flowcore.flux import (
    Codec,
    Dct,
    Fourier,
    Patches,
    Points,
    Series,
    Space,
    SpacePair,
    Symbols,
    codec_from_dict,
)
from flowcore.flux.codecs import codec_to_dict

ALL: dict[str, Codec] = {
    "points": Points(count=5, dim=3),
    "set": Points(count=5, dim=2, is_ordered=False, tag=1),
    "fourier": Fourier(harmonics=3, count=24),
    "patches": Patches(patch=2, colors=3, height=4, width=6),
    "dct": Dct(patch=4, keep=16, colors=2, height=4, width=8),
    "symbols": Symbols(size=7, count=4),
    "series": Series(window=3, count=9, colors=2),
}
POSITIONS = {
    "points": [[0, 0], [0, 1], [0, 2], [0, 3], [0, 4]],
    "set": [[1, 0]] * 5,
    "fourier": [[1, 0], [2, 0], [3, 0]],
    "patches": [[0, 0, 0], [0, 0, 1], [0, 0, 2], [0, 1, 0], [0, 1, 1], [0, 1, 2]],
    "dct": [[0, 0, 0], [0, 0, 1]],
    "symbols": [[1, 0, 0], [2, 0, 0], [3, 0, 0], [4, 0, 0]],
    "series": [[0, 0], [0, 1], [0, 2]],
}


def samples_of(codec: Codec, count: int = 6) -> Tensor:
    """Random samples that the codec can hold."""
    draw = torch.Generator().manual_seed(0)
    if isinstance(codec, Symbols):
        return torch.randint(codec.size, (count, codec.count), generator=draw)
    if isinstance(codec, Fourier):
        return codec.decode(torch.randn(count, codec.harmonics, 4, generator=draw, dtype=torch.float64))
    return torch.randn(count, *codec.shape, generator=draw, dtype=torch.float64)


@pytest.mark.parametrize("name", ALL)
def test_decoding_undoes_encoding(name: str) -> None:
    codec = ALL[name]
    samples = samples_of(codec)
    tokens = codec.encode(samples)
    assert tokens.shape == (6, len(POSITIONS[name]), codec.channels)
    torch.testing.assert_close(codec.decode(tokens), samples, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ALL)
def test_positions_are_those_of_the_format(name: str) -> None:
    assert ALL[name].positions().tolist() == [POSITIONS[name]]


@pytest.mark.parametrize("name", ALL)
def test_a_space_comes_back_from_its_metadata(name: str) -> None:
    space = Space.fit(ALL[name], samples_of(ALL[name]))
    pair = SpacePair(condition=space, data=space)
    assert SpacePair.from_metadata(pair.to_metadata()) == pair


@pytest.mark.parametrize("name", ["points", "fourier", "patches", "dct", "series"])
def test_a_fitted_space_normalises_its_samples_and_decodes_them(name: str) -> None:
    samples = samples_of(ALL[name], 200) * 3 + 1
    if name == "fourier":
        samples = samples - 1  # constants are not kept
    space = Space.fit(ALL[name], samples)
    tokens = space.encode(samples).tokens
    assert tokens.dtype == torch.float32
    channels = tokens.flatten(0, 1)
    torch.testing.assert_close(channels.mean(0), torch.zeros(tokens.shape[2]), rtol=0, atol=1e-5)
    torch.testing.assert_close(channels.std(0, correction=0), torch.ones(tokens.shape[2]), rtol=0, atol=1e-5)
    torch.testing.assert_close(space.decode(tokens), samples.float(), rtol=0, atol=1e-4)


def test_fourier_tokens_are_the_coefficients_of_the_curve() -> None:
    codec = Fourier(harmonics=2, count=8)
    angle = 2 * math.pi * torch.arange(8) / 8
    norm = math.sqrt(1 + 1 / 4)
    curve = torch.stack((angle.cos() / norm, (2 * angle).sin() / (2 * norm)), dim=1)[None]
    expected = torch.tensor([[[1.0, 0, 0, 0], [0, 0, 0, 1.0]]])
    torch.testing.assert_close(codec.encode(curve), expected, rtol=0, atol=1e-6)


def test_dct_errors_of_tokens_are_errors_of_pixels_and_zigzag_begins_with_the_slowest_waves() -> None:
    codec = Dct(patch=4, keep=16, colors=1, height=4, width=4)
    picture = torch.randn(1, 1, 4, 4, dtype=torch.float64)
    torch.testing.assert_close(codec.encode(picture).square().sum(), picture.square().sum())
    few = replace(codec, keep=3)
    across = torch.cos(math.pi / 4 * (torch.arange(4, dtype=torch.float64) + 0.5)).expand(4, 4)
    tokens = few.encode(torch.stack((torch.ones(4, 4, dtype=torch.float64), across, across.T))[:, None])
    assert tokens.abs().gt(1e-9).squeeze(1).tolist() == [
        [True, False, False],
        [False, True, False],
        [False, False, True],
    ]


def test_patches_are_packed_as_flux_packs_latents() -> None:
    picture = torch.arange(8.0).reshape(1, 2, 2, 2)
    assert Patches(patch=2, colors=2, height=2, width=2).encode(picture).tolist() == [[list(range(8))]]


def test_spaces_of_two_and_three_axes_share_three() -> None:
    spaces = [Space.fit(ALL[name], samples_of(ALL[name])) for name in ("fourier", "patches")]
    pair = SpacePair(condition=spaces[0], data=spaces[1])
    assert pair.num_axes == 3
    assert pair.encode_condition(samples_of(ALL["fourier"])).ids.tolist() == [[[k, 0, 0] for k in (1, 2, 3)]]
    assert pair.data_positions().tolist() == [POSITIONS["patches"]]


def test_a_space_refuses_samples_of_another_shape() -> None:
    space = Space.fit(ALL["series"], samples_of(ALL["series"]))
    with pytest.raises(ShapeError, match=r"series space must have shape b 9 2, got \(6, 5, 3\)"):
        space.encode(samples_of(ALL["points"]))


def test_a_channel_that_never_changes_keeps_its_size() -> None:
    space = Space.fit(Points(count=1, dim=1), torch.full((4, 1, 1), 5.0))
    assert (space.mean, space.std) == ((5.0,), (1.0,))


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"kind": "spots"}, "kind of a space must be one of points, fourier, .*, got 'spots'"),
        ({"kind": "points", "count": 3}, "dim of a points space must be a whole number.*, got nothing"),
        ({"kind": "points", "count": 3, "dim": 0}, "dim .* of at least 1, got 0"),
        ({"kind": "points", "count": 3, "dim": 2, "is_ordered": 1}, "must be true or false, got 1"),
        ({"kind": "points", "count": 3, "dims": 2}, "dims"),
        (
            {"kind": "fourier", "harmonics": 4, "count": 8},
            "count of a fourier space must be above .* 8, got 8",
        ),
        ({"kind": "series", "window": 4, "count": 6}, "multiple of window = 4, got 6"),
        ({"kind": "patches", "patch": 4, "colors": 1, "height": 6, "width": 8}, "multiples of patch = 4"),
        (
            {"kind": "dct", "patch": 2, "keep": 5, "colors": 1, "height": 2, "width": 2},
            r"keep .* in 1\.\.4, got 5",
        ),
    ],
)
def test_a_bad_table_is_one_line_that_names_the_field(table: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        codec_from_dict(table)


@pytest.mark.parametrize("name", ALL)
def test_tables_and_codecs_are_the_same(name: str) -> None:
    assert codec_from_dict(codec_to_dict(ALL[name])) == ALL[name]


def test_symbols_out_of_range_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"symbols must lie in 0\.\.6, got 1\.\.7"):
        ALL["symbols"].encode(torch.tensor([[1, 7, 2, 3]]))


def test_a_file_without_spaces_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"flowcore\.space must describe the spaces"):
        SpacePair.from_metadata({})


def test_a_space_needs_a_number_a_channel() -> None:
    with pytest.raises(ConfigError, match="mean of a points space must hold 3 numbers, got 2"):
        Space(codec=ALL["points"], mean=(0.0, 0.0), std=(1.0, 1.0, 1.0))
