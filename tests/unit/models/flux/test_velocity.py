"""The adapter to the project's convention: grids, sequences, and what goes with them."""

from typing import Any

import pytest
import torch
from torch import Tensor

from flowcore.conditioning import Conditioning, cat
from flowcore.errors import ShapeError
from flowcore.models.flux import PRESETS, Flux, default_extras, velocity
from flowcore.models.flux.packing import pack


class Recorder:
    """A forward that keeps what it is called with, and returns twice the first channels of the tokens."""

    def __init__(self, out_channels: int) -> None:
        self.out_channels = out_channels
        self.given: dict[str, Any] = {}

    def __call__(self, *arguments: Any, **keywords: Any) -> Tensor:
        names = ("img", "img_ids", "txt", "txt_ids", "timesteps", "y", "guidance")
        self.given = {**dict(zip(names, arguments, strict=True)), **keywords}
        return arguments[0][..., : self.out_channels] * 2


SIGMA = torch.tensor([0.25, 1.0])
CONTEXT = torch.randn(1, 3, 8, generator=torch.Generator().manual_seed(0))


def test_grid_is_packed_and_unpacked() -> None:
    forward, latents = Recorder(16), torch.randn(2, 4, 4, 6)
    conditioning = Conditioning(
        context=CONTEXT, pooled=torch.ones(1, 5), extras={"guidance": torch.tensor([3.5])}
    )
    result = velocity(forward, latents, SIGMA, conditioning, dtype=torch.bfloat16, runtime="any")
    given = forward.given
    assert result.dtype == torch.float32
    assert torch.equal(result, latents.bfloat16().float() * 2)
    assert torch.equal(given["img"], pack(latents).bfloat16())
    assert given["img_ids"].shape == (1, 6, 3)
    assert given["img_ids"][0, 4].tolist() == [0, 1, 1]
    assert (given["txt"].dtype, given["txt"].shape) == (torch.bfloat16, (2, 3, 8))
    assert torch.equal(given["txt_ids"], torch.zeros(1, 3, 3, dtype=torch.long))
    assert torch.equal(given["timesteps"], SIGMA)
    assert given["y"].shape == (2, 5)
    assert given["guidance"].tolist() == [3.5, 3.5]
    assert given["mask"] is None
    assert given["runtime"] == "any"


@pytest.mark.parametrize(("height", "width"), [(3, 6), (5, 7), (1, 1)])
def test_odd_grid_repeats_from_its_start_and_is_cropped(height: int, width: int) -> None:
    forward, latents = Recorder(16), torch.randn(2, 4, height, width)
    result = velocity(forward, latents, SIGMA, Conditioning(context=CONTEXT))
    assert torch.equal(result, latents * 2)
    rows, columns = torch.arange(height + height % 2) % height, torch.arange(width + width % 2) % width
    assert torch.equal(forward.given["img"], pack(latents[:, :, rows][..., columns]))


def test_sequence_brings_its_positions() -> None:
    forward, latents = Recorder(4), torch.randn(2, 4, 6)
    ids = {"img_ids": torch.randn(2, 6, 2), "txt_ids": torch.randn(1, 3, 2)}
    extras = {**ids, "img_mask": torch.tensor([[True] * 5 + [False]]), "control": torch.randn(2, 3, 6)}
    result = velocity(forward, latents, SIGMA, Conditioning(context=CONTEXT, extras=extras))
    assert torch.equal(result, latents * 2)
    assert torch.equal(forward.given["img"][..., :4], latents.mT)
    assert torch.equal(forward.given["img"][..., 4:], extras["control"].mT)
    assert all(forward.given[name] is ids[name] for name in ids)
    assert forward.given["mask"].tolist() == [[True] * 3 + [True] * 5 + [False]] * 2


def test_positions_are_never_rounded() -> None:
    forward, latents = Recorder(4), torch.randn(1, 4, 2)
    ids = torch.tensor([[[1000.25, 3.0], [1001.5, 7.0]]])
    conditioning = Conditioning(context=CONTEXT, extras={"img_ids": ids})
    velocity(forward, latents, SIGMA[:1], conditioning, dtype=torch.bfloat16)
    assert torch.equal(forward.given["img_ids"], ids)
    assert forward.given["txt_ids"].dtype == ids.dtype


def test_masks_of_joined_conditions_reach_the_model() -> None:
    forward, latents = Recorder(16), torch.randn(2, 4, 2, 2)
    joined = cat([Conditioning(context=CONTEXT), Conditioning(context=CONTEXT[:, :1])])
    velocity(forward, latents, SIGMA, joined)
    assert forward.given["mask"].tolist() == [[True, True, True, True], [True, False, False, True]]


def test_control_channels_follow_those_of_the_latents() -> None:
    forward, latents, control = Recorder(16), torch.randn(2, 4, 4, 4), torch.randn(1, 6, 4, 4)
    result = velocity(forward, latents, SIGMA, Conditioning(context=CONTEXT, extras={"control": control}))
    assert torch.equal(result, latents * 2)
    assert torch.equal(forward.given["img"][1], torch.cat((pack(latents)[1], pack(control)[0]), dim=-1))


def test_reference_stands_behind_and_is_cut_off() -> None:
    forward, latents, reference = Recorder(16), torch.randn(2, 4, 4, 4), torch.randn(1, 4, 2, 6)
    mask = torch.tensor([[True, True, False]])
    conditioning = Conditioning(context=CONTEXT, context_mask=mask, extras={"reference": reference})
    result = velocity(forward, latents, SIGMA, conditioning)
    assert torch.equal(result, latents * 2)
    assert torch.equal(forward.given["img"][0, 4:], pack(reference)[0])
    assert forward.given["img_ids"][0, 4:].tolist() == [[1, 0, 0], [1, 0, 1], [1, 0, 2]]
    assert forward.given["mask"].tolist() == [[True, True, False] + [True] * 7] * 2


@pytest.mark.parametrize(
    ("latents", "extras", "message"),
    [
        (torch.zeros(1, 4, 2, 2), {"addon_info": torch.zeros(1)}, "conditions of Flux must be among"),
        (torch.zeros(1, 4), {}, "latents must be a grid b c h w or a sequence b c n, got (1, 4)"),
        (torch.zeros(1, 4, 6), {}, "a sequence of tokens must come with img_ids"),
        (torch.zeros(1, 4, 4, 4), {"control": torch.zeros(1, 4, 4, 6)}, "control must have the size (4, 4)"),
        (
            torch.zeros(1, 4, 4, 4),
            {"control": torch.zeros(1, 4, 4, 4), "reference": torch.zeros(1, 4, 4, 4)},
            "a reference picture must have the latents' channels, got 16 a token for 32",
        ),
    ],
)
def test_unusable_input_is_named(latents: Tensor, extras: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ShapeError) as caught:
        velocity(Recorder(4), latents, torch.ones(1), Conditioning(context=CONTEXT, extras=extras))
    assert str(caught.value).startswith(message)


def test_missing_context_is_named() -> None:
    with pytest.raises(ShapeError, match="the context must hold at least one token, got None"):
        velocity(Recorder(4), torch.zeros(1, 1, 2, 2), torch.ones(1), Conditioning())


def test_usual_guidance_where_the_model_embeds_it() -> None:
    assert default_extras(PRESETS["flux-dev"], 128, 64)["guidance"].tolist() == [3.5]
    assert default_extras(PRESETS["demo"], 128, 64) == {}


@torch.no_grad()
def test_demo_model_takes_pictures_of_any_side() -> None:
    model = Flux(PRESETS["demo"]).eval()
    latents = torch.randn(1, 16, 3, 5)
    result = velocity(model.forward, latents, torch.ones(1), Conditioning(context=torch.randn(1, 4, 128)))
    assert result.shape == latents.shape
