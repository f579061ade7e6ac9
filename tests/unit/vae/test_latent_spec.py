"""Latent spaces: constants, inverse, files that round them."""

import pytest
import torch
from torch.testing import assert_close

from flowcore.errors import CheckpointError, ConfigError, ShapeError
from flowcore.vae.latent_spec import (
    LATENT_SPECS,
    LatentSpec,
    scaled_spec,
    spec_from_metadata,
    spec_from_statistics,
)


@pytest.mark.parametrize(
    ("name", "scale", "shift"),
    [("sd15", 0.18215, 0.0), ("sdxl", 0.13025, 0.0), ("sd3", 1.5305, 0.0609), ("flux1", 0.3611, 0.1159)],
)
def test_scaled_spaces_are_scale_times_raw_minus_shift(name: str, scale: float, shift: float) -> None:
    spec = LATENT_SPECS[name]
    raw = torch.randn(2, spec.channels, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert_close(spec.to_model(raw), scale * (raw - shift))


def test_eq_sdxl_is_normalised_per_channel() -> None:
    raw = torch.ones(1, 4, 1, 1, dtype=torch.float64)
    first = LATENT_SPECS["eq-sdxl"].to_model(raw)[0, 0, 0, 0]
    assert float(first) == pytest.approx((1 + 3.865960634760459) / 10.036514488374861)


@pytest.mark.parametrize("name", sorted(LATENT_SPECS))
def test_from_model_is_the_inverse(name: str) -> None:
    spec = LATENT_SPECS[name]
    raw = torch.randn(2, spec.channels, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert_close(spec.from_model(spec.to_model(raw)), raw)


def test_statistics_rounded_to_float16_give_the_exact_space() -> None:
    eq = LATENT_SPECS["eq-sdxl"]
    mean, std = (torch.tensor(values).half().tolist() for values in (eq.mean, eq.std))
    assert spec_from_statistics(mean, std) is eq


def test_other_statistics_stay_as_the_file_has_them() -> None:
    eq = LATENT_SPECS["eq-sdxl"]
    std = [eq.std[0] * 1.01, *eq.std[1:]]
    spec = spec_from_statistics(eq.mean, std, name="mine")
    assert (spec.name, spec.std) == ("mine", tuple(std))


def test_metadata_gives_statistics_or_a_known_name() -> None:
    def read(**entries: str) -> LatentSpec | None:
        return spec_from_metadata({f"flowcore.{key}": text for key, text in entries.items()}, source="a.file")

    mine = LatentSpec(name="mine", channels=2, downscale=8, mean=(0.0, 1.0), std=(1.0, 2.0))
    assert read(latents_mean="[0, 1]", latents_std="[1.0, 2.0]", latent_spec="mine") == mine
    assert read(latent_spec="sdxl") is LATENT_SPECS["sdxl"]
    assert read() is None
    with pytest.raises(CheckpointError, match=r"latent_spec in a\.file must be one of .*got 'mine'"):
        read(latent_spec="mine")
    for text in ("[1, ", "3", '["x"]'):
        with pytest.raises(CheckpointError, match=r"latents_mean in a\.file must be a JSON list of numbers"):
            read(latents_mean=text, latents_std="[1]")


def test_a_known_space_is_found_by_its_name_whatever_its_cells_are() -> None:
    flux2 = LATENT_SPECS["flux2"]
    assert (flux2.grid, flux2.mean[0], flux2.std[0]) == ((128, 16, 2), 0.0, 1.0)
    assert spec_from_statistics(flux2.mean, flux2.std, name="flux2") is flux2
    other = spec_from_statistics(flux2.mean, flux2.std, downscale=8)
    assert (other.name, other.grid) == ("custom", (128, 8, 1))
    assert spec_from_statistics(flux2.mean[:8], flux2.std[:8], downscale=4, patch=2).grid == (8, 4, 2)


def test_dtype_and_shape_are_kept() -> None:
    raw = torch.zeros(1, 16, 2, 3, dtype=torch.bfloat16)
    latents = LATENT_SPECS["flux1"].to_model(raw)
    assert (latents.dtype, latents.shape) == (raw.dtype, raw.shape)


def test_wrong_channels_are_named() -> None:
    with pytest.raises(ShapeError, match=r"sdxl latents must be `b 4 h w`, got \(1, 16, 2, 2\)"):
        LATENT_SPECS["sdxl"].to_model(torch.zeros(1, 16, 2, 2))


def test_every_channel_needs_its_statistics() -> None:
    with pytest.raises(ConfigError, match="must have 2 values, got 2 and 1"):
        LatentSpec(name="mine", channels=2, downscale=8, mean=(0.0, 0.0), std=(1.0,))


def test_std_is_positive() -> None:
    with pytest.raises(ConfigError, match=r"std of mine must be positive, got -1\.0"):
        scaled_spec("mine", channels=2, scale=-1.0)
