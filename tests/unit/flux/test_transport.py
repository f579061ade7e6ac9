"""Samples of one space from conditions in another."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from flowcore.errors import CheckpointError, ConfigError, ShapeError
from flowcore.flow import SOLVERS
from flowcore.flux import Fourier, Points, Space, SpacePair, load_transport, transport
from flowcore.models import xut
from flowcore.models.flux import PRESETS, Flux
from flowcore.weights.checkpoint import save_model

CURVES = Fourier(harmonics=3, count=24)


@pytest.fixture(scope="module")
def curves() -> Tensor:
    return CURVES.decode(torch.randn(4, 3, 4, generator=torch.Generator().manual_seed(1)))


@pytest.fixture(scope="module")
def spaces(curves: Tensor) -> SpacePair:
    points = Points(count=24, dim=2)
    return SpacePair(condition=Space.fit(CURVES, curves), data=Space.fit(points, curves))


@pytest.fixture(scope="module")
def model() -> Flux:
    torch.manual_seed(0)
    return Flux(PRESETS["points"]).eval()


@pytest.mark.parametrize("solver", ["euler", "heun", "euler_ancestral"])
def test_a_sample_depends_on_its_condition_and_the_seed_alone(
    model: Flux, curves: Tensor, spaces: SpacePair, solver: str
) -> None:
    made = transport(model, curves, space=spaces, steps=3, solver=solver)
    assert made.shape == (4, 24, 2)
    assert torch.equal(made, transport(model, curves, space=spaces, steps=3, solver=solver))
    assert not torch.equal(made, transport(model, curves, space=spaces, steps=3, solver=solver, seed=1))
    first = transport(model, curves[:1], space=spaces, steps=3)
    if solver == "euler":
        torch.testing.assert_close(made[:1], first, rtol=0, atol=1e-5)
    assert solver in SOLVERS


def test_a_source_takes_the_place_of_noise(model: Flux, curves: Tensor, spaces: SpacePair) -> None:
    made = transport(model, curves, space=spaces, source=curves.flip(0), steps=2)
    assert torch.equal(made, transport(model, curves, space=spaces, source=curves.flip(0), steps=2, seed=9))
    assert not torch.equal(made, transport(model, curves, space=spaces, source=curves, steps=2))


def test_guidance_moves_away_from_the_empty_condition(model: Flux, curves: Tensor, spaces: SpacePair) -> None:
    plain, guided = (transport(model, curves, space=spaces, steps=1, cfg_scale=scale) for scale in (1.0, 3.0))
    empty = transport(model, curves, space=spaces, steps=1, cfg_scale=0.0)
    torch.testing.assert_close(guided, empty + 3 * (plain - empty), rtol=0, atol=1e-4)
    assert (guided - plain).abs().max() > 1e-3


def test_errors_name_what_does_not_fit(model: Flux, curves: Tensor, spaces: SpacePair) -> None:
    with pytest.raises(ShapeError, match=r"fourier space must have shape b 24 2, got \(4, 3\)"):
        transport(model, curves[:, :3, 0], space=spaces)
    with pytest.raises(ConfigError, match=r"the solver must be one of euler, .*, got 'oiler'"):
        transport(model, curves, space=spaces, solver="oiler")


def test_a_file_brings_its_spaces(model: Flux, curves: Tensor, spaces: SpacePair, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    state = model.state_dict()
    save_model(path, state, architecture="flux", config=model.config, metadata=spaces.to_metadata())
    loaded = load_transport(path)
    assert loaded.spaces == spaces
    made = transport(loaded.model, curves, space=loaded.spaces, steps=2)
    assert torch.equal(made, transport(model, curves, space=spaces, steps=2))


def test_files_of_other_models_are_refused(model: Flux, tmp_path: Path) -> None:
    path = tmp_path / "flux.safetensors"
    save_model(path, model.state_dict(), architecture="flux", config=model.config)
    with pytest.raises(CheckpointError, match=r"flowcore\.space must describe"):
        load_transport(path)
    other = xut.XUDiT(xut.PRESETS["tiny"])
    save_model(path, other.state_dict(), architecture="xut", config=other.config)
    with pytest.raises(ConfigError, match="must hold a flux model, got xut"):
        load_transport(path)
