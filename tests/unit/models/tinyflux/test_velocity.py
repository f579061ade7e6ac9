"""TinyFlux in the project's convention."""

import pytest
import torch
from torch import Tensor

from flowcore.conditioning import Conditioning, cat, zeroed
from flowcore.errors import ShapeError
from flowcore.models import find_architecture
from flowcore.models.tinyflux import velocity, velocity_and_experts
from tests.support import FORWARD_LIMIT, assert_close
from tests.unit.models.tinyflux.small import inputs, random_model, teachers


def told(**extras: Tensor) -> Conditioning:
    given = inputs()
    return Conditioning(
        context=given["encoder_hidden_states"], pooled=given["pooled_projections"], extras=extras
    )


@torch.no_grad()
def test_time_and_sign_are_reversed() -> None:
    model, given = random_model(), inputs()
    latents = given["hidden_states"].transpose(1, 2).unflatten(2, (3, 4))
    result = velocity(model.forward, latents, 1 - given["timestep"], told())
    expected = -model(**given).transpose(1, 2).unflatten(2, (3, 4))
    assert_close(result, expected, limit=FORWARD_LIMIT)


@torch.no_grad()
@pytest.mark.parametrize("size", [(1, 5), (6, 2), (7, 7)])
def test_any_size(size: tuple[int, int]) -> None:
    latents = torch.randn(2, 4, *size)
    assert velocity(random_model().forward, latents, torch.rand(2), told()).shape == latents.shape


@torch.no_grad()
def test_one_conditioning_serves_a_batch_and_joined_ones_their_rows() -> None:
    model, sigma = random_model(), torch.tensor([0.3, 0.3])
    latents, whole = torch.randn(2, 4, 3, 4), told()
    assert whole.context is not None
    assert whole.pooled is not None
    one = Conditioning(context=whole.context[:1], pooled=whole.pooled[:1])
    short = Conditioning(context=whole.context[1:, :2], pooled=whole.pooled[1:])
    both = velocity(model.forward, latents, sigma, cat([one, short]))
    first = velocity(model.forward, latents, sigma, one)[:1]
    second = velocity(model.forward, latents[1:], sigma[1:], short)
    assert_close(both, torch.cat((first, second)), limit=FORWARD_LIMIT)


@torch.no_grad()
def test_computing_in_another_dtype_keeps_that_of_the_latents() -> None:
    model = random_model()
    latents = torch.randn(2, 4, 3, 4, dtype=torch.float64)
    result = velocity(model.forward, latents, torch.rand(2), told(), dtype=torch.float32)
    assert result.dtype == torch.float64


@torch.no_grad()
def test_extras_and_switches_reach_the_model() -> None:
    model = random_model()
    latents, sigma = torch.randn(2, 4, 3, 4), torch.rand(2)
    plain, info = velocity_and_experts(model.forward, latents, sigma, told())
    taught = velocity(model.forward, latents, sigma, told(**teachers()))
    absent = {"lune_present": torch.tensor([False, False]), "sol_present": torch.tensor([False, False])}
    assert info["sol"]["pred_spatial"].shape == (2, 4, 4)
    assert not torch.equal(plain, taught)
    assert torch.equal(plain, velocity(model.forward, latents, sigma, told(**teachers(), **absent)))
    for switch in ("use_lune", "use_sol"):
        assert not torch.equal(plain, velocity(model.forward, latents, sigma, told(), **{switch: False}))


def test_wrong_conditions_are_named() -> None:
    model = random_model()
    latents, sigma = torch.randn(2, 4, 3, 4), torch.rand(2)
    with pytest.raises(ShapeError, match=r"conditions of TinyFlux must be among .*got \['class_ids'\]"):
        velocity(model.forward, latents, sigma, told(class_ids=torch.zeros(2)))
    with pytest.raises(ShapeError, match="must have a context, got none"):
        velocity(model.forward, latents, sigma, Conditioning())
    with pytest.raises(ShapeError, match="latents must be b c h w"):
        velocity(model.forward, latents[0], sigma, told())


def test_row() -> None:
    row = find_architecture("tinyflux")
    assert row.latent_channels(row.presets["demo"]) == 16
    assert row.size_extras(row.presets["demo"], 64, 96) == {}
    assert row.text_shape(row.presets["demo"]).needs_pooled is False
    assert row.text_shape(row.presets["tinyflux-deep"]).needs_pooled is True
    assert row.null_text is zeroed
    assert all(row.config_from_dict(config.to_dict()) == config for config in row.presets.values())
