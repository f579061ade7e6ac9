"""TinyFlux as a whole: sizes, batches, text, images that are no square, predictors, hooks."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flowcore.errors import ShapeError
from flowcore.layers.attention import sdpa
from flowcore.models.tinyflux import PRESETS, TinyFlux, TinyFluxConfig
from flowcore.models.tinyflux.blocks import grid_positions
from flowcore.models.tinyflux.inputs import ExpertUse
from flowcore.ops import Runtime, run_checkpointed
from tests.support import FORWARD_LIMIT, assert_close
from tests.unit.models.tinyflux.small import BARE, CONFIG, SIZE, inputs, random_model, row, teachers


@pytest.mark.parametrize(
    ("preset", "parameters", "tensors"),
    [
        ("tinyflux-deep", 245_347_234, 683),
        ("tinyflux-deep-v3", 243_884_817, 579),
        ("demo", 2_377_434, 143),
        ("tiny", 320_680, 97),
    ],
)
def test_sizes_of_presets(preset: str, parameters: int, tensors: int) -> None:
    model = TinyFlux(PRESETS[preset], device="meta")
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert len(model.state_dict()) == tensors


def test_sizes_of_parts() -> None:
    model = TinyFlux(PRESETS["tinyflux-deep"], device="meta")
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    assert counts == {
        "double_blocks": 141_757_560,
        "single_blocks": 98_432_200,
        "lune_predictor": 2_496_257,
        "sol_prior": 805_712,
        "t5_pool": 656_384,
        "txt_in": 393_728,
        "time_in": 394_240,
        "vector_in": 393_728,
        "img_in": 8_704,
        "final_norm": 512,
        "final_linear": 8_208,
        "rope": 0,
    }
    assert model.text_balance is not None
    assert model.text_balance.numel() == 1


def test_initial_values() -> None:
    model = TinyFlux(CONFIG).eval()
    assert not model(**inputs()).any()
    assert model.lune_predictor is not None
    assert model.sol_prior is not None
    assert model.lune_predictor.expert_gate == 0
    assert model.sol_prior.blend_gate.item() == pytest.approx(0.847298, abs=1e-6)
    block = model.double_blocks[0]
    assert not block.attn.spatial_to_mod.weight.any()
    assert block.img_norm1.linear.weight.any()
    assert not block.img_norm1.linear.bias.any()
    bound = (6 / (32 + 192)) ** 0.5
    assert block.img_norm1.linear.weight.abs().max().item() == pytest.approx(bound, rel=0.01)


def test_freezing_leaves_the_predictors_out() -> None:
    model = TinyFlux(replace(CONFIG, freeze_lune=True, freeze_sol=True))
    frozen = {name.split(".")[0] for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {"lune_predictor", "sol_prior"}


@torch.no_grad()
@pytest.mark.parametrize("config", [CONFIG, BARE], ids=["full", "bare"])
def test_batch_of_two_equals_two_of_one(config: TinyFluxConfig) -> None:
    model, given = random_model(config), inputs()
    single = [model(**row(given, index)) for index in range(2)]
    assert_close(model(**given), torch.cat(single), limit=FORWARD_LIMIT)


@torch.no_grad()
def test_masked_text_has_no_influence() -> None:
    model, given = random_model(), inputs()
    mask = torch.tensor([[True, True, True, False, False]] * 2)
    shorter = {**given, "encoder_hidden_states": given["encoder_hidden_states"][:, :3]}
    actual = model(**given, context_mask=mask)
    assert_close(actual, model(**shorter), limit=FORWARD_LIMIT)
    changed = given["encoder_hidden_states"].clone()
    changed[:, 3:] = 1e3
    assert torch.equal(model(**{**given, "encoder_hidden_states": changed}, context_mask=mask), actual)
    assert not torch.equal(model(**given), actual)


@torch.no_grad()
def test_a_transposed_image_with_transposed_positions_gives_the_transposed_velocity() -> None:
    """Tokens are a set with positions: size and positions alone tell rows from columns."""
    model = random_model(replace(CONFIG, use_sol_prior=False))
    given = inputs()
    turned = given["hidden_states"].unflatten(1, SIZE).transpose(1, 2).flatten(1, 2)
    places = grid_positions(*SIZE).unflatten(0, SIZE).transpose(0, 1).flatten(0, 1)
    actual = model(**{**given, "hidden_states": turned, "size": SIZE[::-1]}, img_ids=places)
    expected = model(**given).unflatten(1, SIZE).transpose(1, 2).flatten(1, 2)
    assert_close(actual, expected, limit=FORWARD_LIMIT)


@torch.no_grad()
def test_importance_follows_the_shape_of_the_image() -> None:
    """A map that is bright on the right weighs the right columns, in images of any shape."""
    model = random_model()
    seen: list[Tensor] = []

    def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        seen.append(k[:, :, 5:].norm(dim=-1))
        return sdpa(q, k, v, bias)

    bright = torch.tensor([0.0, 0.0, 1.0, 1.0]).expand(1, 4, 4)
    for block in (*model.double_blocks, *model.single_blocks):
        nn.init.constant_(block.attn.spatial_to_mod.weight, 1.5)
    given = row(inputs(size=(2, 6)), 0)
    results = []
    for spatial in (bright, torch.zeros(1, 4, 4)):
        model(**given, sol_spatial=spatial, runtime=Runtime(attention=attention))
        results.append(seen[0].reshape(2, 2, 6))
        seen.clear()
    ratio = results[0] / results[1]  # nh h w
    assert (ratio[..., 0] < 1.01).all()
    assert (ratio[..., -1] > 1.5).all()
    assert_close(ratio[:, 0], ratio[:, 1], limit=FORWARD_LIMIT)


@torch.no_grad()
def test_size_is_only_needed_for_images_that_are_no_square() -> None:
    model, given = random_model(), inputs(size=(3, 3))
    expected = model(**given)
    del given["size"]
    assert torch.equal(model(**given), expected)
    assert torch.equal(model(**given, img_ids=grid_positions(3, 3).expand(2, -1, -1).long()), expected)
    wide = inputs()
    del wide["size"]
    with pytest.raises(ShapeError, match=r"size must be \(rows, columns\) .* got None for 12 tokens"):
        model(**wide)
    with pytest.raises(ShapeError, match="size must give the number of tokens 12, got 3 x 5"):
        model(**wide, size=(3, 5))


@torch.no_grad()
def test_a_token_may_be_a_square_of_cells() -> None:
    """The padded row of an odd grid is the picture's start again; what it says is cut off."""
    model, given = random_model(replace(CONFIG, patch_size=2)), inputs(size=(3, 4))
    assert model.img_in.weight.shape[1] == 16
    seen: list[torch.Size] = []
    handle = model.img_in.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape))
    result = model(**given)
    handle.remove()
    assert seen == [(2, 4, 16)]
    assert result.shape == (2, 12, 4)
    grid = given["hidden_states"].unflatten(1, (3, 4))
    whole = torch.cat((grid, grid[:, :1]), dim=1).flatten(1, 2)
    expected = model(**given | {"hidden_states": whole, "size": (4, 4)})
    assert_close(result, expected[:, :12], limit=FORWARD_LIMIT)


@torch.no_grad()
def test_text_is_turned_in_single_blocks_alone() -> None:
    model, given = random_model(), inputs()
    places = torch.zeros(5, 3)
    assert torch.equal(model(**given, txt_ids=places), model(**given))
    places[:, 0] = torch.arange(5)
    assert not torch.equal(model(**given, txt_ids=places), model(**given))
    for block in model.single_blocks:
        block.norm.linear.weight[64:] = 0  # their attention adds nothing
        block.norm.linear.bias[64:] = 0
    assert torch.equal(model(**given, txt_ids=places), model(**given))


@torch.no_grad()
def test_predictors_can_be_switched_off() -> None:
    model, given = random_model(), inputs()
    off = ExpertUse(lune=False, sol=False)
    velocity, info = model(**given, use=off, return_expert_pred=True)
    assert info == {"lune": None, "sol": None}
    without = replace(CONFIG, use_lune_expert=False, use_sol_prior=False)
    smaller = TinyFlux(without).eval()
    state = model.state_dict()
    smaller.load_state_dict({name: state[name] for name in smaller.state_dict()})
    assert_close(velocity, smaller(**given), limit=FORWARD_LIMIT)


@torch.no_grad()
def test_teachers_replace_predictions_sample_by_sample() -> None:
    model, given, taught = random_model(), inputs(), teachers()
    _, guesses = model(**given, return_expert_pred=True)
    with_all, info = model(**given, **taught, return_expert_pred=True)
    plain = model(**given)
    assert info["lune"]["expert_used"] == "real"
    assert guesses["lune"]["expert_used"] == "predicted"
    for name in ("pred_stats", "pred_spatial"):
        assert torch.equal(info["sol"][name], guesses["sol"][name])
    present = torch.tensor([True, False])
    mixed = model(**given, **taught, use=ExpertUse(lune_present=present, sol_present=present))
    assert_close(mixed, torch.stack([with_all[0], plain[1]]), limit=FORWARD_LIMIT)
    assert (with_all[1] - plain[1]).abs().max() > 1e-3


@torch.no_grad()
def test_temperature_is_never_below_a_tenth() -> None:
    model, given = random_model(), inputs()
    assert model.sol_prior is not None
    nn.init.constant_(model.sol_prior.stat_to_temperature[2].bias, -50.0)
    nn.init.constant_(model.sol_prior.blend_gate, -50.0)
    assert model(**given).isfinite().all()


def test_dropout_needs_a_generator_and_follows_it() -> None:
    model = random_model(replace(CONFIG, lune_dropout=0.5)).train()
    given = inputs()
    with pytest.raises(ShapeError, match="generator must be given when Lune drops out"):
        model(**given)
    first, again, other = (
        model(**given, generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    model.eval()
    assert torch.equal(model(**given), model(**given))


@torch.no_grad()
def test_guidance_is_embedded_where_there_is_a_layer() -> None:
    model, given = random_model(replace(CONFIG, guidance_embeds=True)), inputs()
    plain, one = model(**given), model(**given, guidance=torch.ones(2))
    assert not torch.equal(plain, one)
    assert not torch.equal(one, model(**given, guidance=torch.full((2,), 4.0)))
    with pytest.raises(ShapeError, match=r"guidance must be absent.*guidance_embeds is not set"):
        random_model()(**given, guidance=torch.ones(2))


@torch.no_grad()
def test_pooled_vector_is_the_mean_of_the_text_where_configured() -> None:
    model = random_model(replace(CONFIG, pooled_projection_dim=12, pooled_from_text=True))
    given = inputs()
    text, mask = given["encoder_hidden_states"], torch.tensor([[True] * 3 + [False] * 2] * 2)
    given["pooled_projections"] = None
    expected = model(**{**given, "pooled_projections": text[:, :3].mean(dim=1)}, context_mask=mask)
    assert_close(model(**given, context_mask=mask), expected, limit=FORWARD_LIMIT)
    expected = model(**{**given, "pooled_projections": text.mean(dim=1)})
    assert_close(model(**given), expected, limit=FORWARD_LIMIT)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_states": torch.zeros(2, 12, 5)}, "hidden_states must be b n 4, got (2, 12, 5)"),
        ({"encoder_hidden_states": torch.zeros(2, 5, 13)}, "encoder_hidden_states must be 2 m 12"),
        ({"encoder_hidden_states": torch.zeros(1, 5, 12)}, "encoder_hidden_states must be 2 m 12"),
        ({"pooled_projections": None}, "pooled_projections must be 2 10, got None"),
        ({"pooled_projections": torch.zeros(2, 11)}, "pooled_projections must have shape (2, 10)"),
        ({"timestep": torch.zeros(3)}, "timestep must be one for each of 2 samples, got (3,)"),
        ({"img_ids": torch.zeros(9, 3)}, "img_ids must be 12 3 or b 12 3, got (9, 3)"),
        ({"txt_ids": torch.zeros(5, 2)}, "txt_ids must be 5 3 or b 5 3, got (5, 2)"),
        ({"context_mask": torch.ones(2, 5)}, "context_mask must be boolean, got torch.float32"),
        ({"context_mask": torch.ones(2, 4, dtype=torch.bool)}, "context_mask must have shape (2, 5)"),
        ({"lune_features": torch.zeros(2, 21)}, "lune_features must have shape (2, 20)"),
        ({"sol_spatial": torch.zeros(2, 8, 8)}, "sol_spatial must have shape (2, 4, 4)"),
    ],
)
def test_wrong_inputs_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ShapeError) as caught:
        random_model()(**{**inputs(), **changes})
    assert message in str(caught.value)


def test_teachers_for_absent_predictors_are_refused() -> None:
    with pytest.raises(ShapeError, match=r"sol_stats must be absent.*use_sol_prior is not set"):
        random_model(BARE)(**inputs(), sol_stats=torch.zeros(2, 3))


@torch.no_grad()
def test_hooks_see_every_block_and_every_attention() -> None:
    model, given = random_model(), inputs()
    blocks: list[tuple[str, int, tuple[int, ...]]] = []
    products: list[tuple[int, ...]] = []

    def run_block(kind: str, index: int, block: Any, x: Tensor) -> Tensor:  # noqa: ANN401
        blocks.append((kind, index, tuple(x.shape)))
        return block(x)

    def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        products.append(tuple(q.shape))
        return sdpa(q, k, v, bias)

    expected = model(**given)
    assert torch.equal(model(**given, runtime=Runtime(run_block=run_block, attention=attention)), expected)
    assert blocks == [("double", 0, (2, 17, 32)), ("single", 0, (2, 17, 32)), ("single", 1, (2, 17, 32))]
    assert products == [(2, 2, 17, 16)] * 3


def test_checkpointing_gives_the_same_gradients() -> None:
    gradients = []
    for runtime in (Runtime(), Runtime(run_block=run_checkpointed)):
        model = random_model()
        model(**inputs(), runtime=runtime).square().sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


def test_every_parameter_but_the_unused_layer_gets_a_gradient() -> None:
    model = random_model()
    model(**inputs()).square().sum().backward()
    idle = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    assert idle == {"sol_prior.spatial_to_qk_scale.weight", "sol_prior.spatial_to_qk_scale.bias"}


@torch.no_grad()
def test_inputs_stay_as_they_are() -> None:
    model, given = random_model(), {**inputs(), **teachers()}
    before = {name: value.clone() for name, value in given.items() if isinstance(value, Tensor)}
    model(**given)
    assert all(torch.equal(given[name], value) for name, value in before.items())
