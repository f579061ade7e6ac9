"""Flux as a whole: batches, masks, positions, conditions, hooks, precision, initial values."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from flowcore.errors import ConfigError, ShapeError
from flowcore.layers.attention import sdpa
from flowcore.models.flux import PRESETS, Flux, FluxConfig
from flowcore.ops import Runtime, run_checkpointed
from tests.support import FORWARD_LIMIT, assert_close

CONFIG = FluxConfig(
    in_channels=3,
    out_channels=5,
    vec_in_dim=6,
    context_in_dim=7,
    hidden_size=32,
    num_heads=2,
    mlp_ratio=2.0,
    depth=2,
    depth_single_blocks=3,
    axes_dim=(4, 12),
    theta=256,
    guidance_embed=True,
)


def random_model(config: FluxConfig = CONFIG) -> Flux:
    """A model in which every parameter has an effect."""
    model = Flux(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            nn.init.normal_(parameter, 1.0 if name.endswith("scale") else 0.0, 0.2, generator=generator)
    return model.eval()


def inputs(batch: int = 2, data: int = 9, text: int = 5) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return {
        "img": draw(batch, data, 3),
        "img_ids": 4 * draw(batch, data, 2),
        "txt": draw(batch, text, 7),
        "txt_ids": 4 * draw(batch, text, 2),
        "timesteps": torch.rand(batch, generator=generator),
        "y": draw(batch, 6),
        "guidance": 3 * draw(batch).abs(),
    }


def sample_of(given: dict[str, Tensor], index: int) -> dict[str, Tensor]:
    return {name: tensor[index : index + 1] for name, tensor in given.items()}


@torch.no_grad()
@pytest.mark.parametrize("changes", [{}, {"depth": 0}, {"depth_single_blocks": 0}, {"qkv_bias": False}])
def test_batch_of_two_equals_two_of_one(changes: dict[str, int]) -> None:
    model, given = random_model(replace(CONFIG, **changes)), inputs()
    single = [model(**sample_of(given, index)) for index in range(2)]
    result = model(**given)
    assert result.shape == (2, 9, 5)
    assert_close(result, torch.cat(single), limit=FORWARD_LIMIT)


@torch.no_grad()
def test_shared_positions_are_those_of_every_sample() -> None:
    model, given = random_model(), inputs()
    given["img_ids"], given["txt_ids"] = given["img_ids"][:1], given["txt_ids"][:1]
    expanded = {**given, "img_ids": given["img_ids"].repeat(2, 1, 1)}
    assert_close(model(**expanded), model(**given), limit=FORWARD_LIMIT)


@torch.no_grad()
def test_whole_positions_equal_the_same_in_floating_point() -> None:
    model, given = random_model(), inputs()
    whole = {name: (given[name] * 50).round().long() for name in ("img_ids", "txt_ids")}
    floating = {name: ids.float() for name, ids in whole.items()}
    assert torch.equal(model(**{**given, **whole}), model(**{**given, **floating}))


@torch.no_grad()
def test_only_differences_of_positions_count() -> None:
    model, given = random_model(), inputs()
    moved = {name: given[name] + torch.tensor([3.5, -20.0]) for name in ("img_ids", "txt_ids")}
    assert_close(model(**{**given, **moved}), model(**given), limit=1e-4)
    assert not torch.allclose(model(**{**given, "img_ids": moved["img_ids"]}), model(**given), atol=1e-3)


@torch.no_grad()
def test_order_of_tokens_does_not_count() -> None:
    """Tokens are told apart by their positions alone, in the data and in the condition."""
    model, given = random_model(), inputs()
    order = torch.randperm(9, generator=torch.Generator().manual_seed(2))
    shuffled = {name: given[name][:, order] for name in ("img", "img_ids")}
    back = {name: given[name].flip(1) for name in ("txt", "txt_ids")}
    assert_close(model(**{**given, **shuffled, **back}), model(**given)[:, order], limit=FORWARD_LIMIT)


@torch.no_grad()
def test_masked_tokens_have_no_influence() -> None:
    model, given = random_model(), inputs()
    padded = {name: given[name].clone() for name in given}
    mask = torch.tensor([[True] * 3 + [False] * 2 + [True] * 7 + [False] * 2] * 2)
    shorter = {
        **given,
        **{name: given[name][:, :3] for name in ("txt", "txt_ids")},
        **{name: given[name][:, :7] for name in ("img", "img_ids")},
    }
    actual = model(**padded, mask=mask)
    assert_close(actual[:, :7], model(**shorter), limit=FORWARD_LIMIT)
    padded["txt"][:, 3:] = 1e3
    padded["img"][:, 7:] = -1e3
    assert torch.equal(model(**padded, mask=mask)[:, :7], actual[:, :7])
    assert not torch.equal(model(**padded)[:, :7], actual[:, :7])
    everything = torch.ones_like(mask)
    assert_close(model(**given, mask=everything), model(**given), limit=FORWARD_LIMIT)


@torch.no_grad()
def test_left_out_y_is_not_zero() -> None:
    model, given = random_model(), inputs()
    without = model(**{**given, "y": None})
    assert not torch.allclose(model(**{**given, "y": torch.zeros(2, 6)}), without, atol=1e-3)
    for layer in (model.vector_in.in_layer, model.vector_in.out_layer):
        nn.init.zeros_(layer.bias)
    assert_close(model(**{**given, "y": torch.zeros(2, 6)}), without, limit=FORWARD_LIMIT)


@torch.no_grad()
def test_guidance_is_read_by_models_that_embed_it() -> None:
    given = inputs()
    stronger = {**given, "guidance": given["guidance"] + 1}
    model, plain = random_model(), random_model(replace(CONFIG, guidance_embed=False))
    assert not torch.allclose(model(**stronger), model(**given), atol=1e-3)
    assert torch.equal(plain(**stronger), plain(**{**given, "guidance": None}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"img": torch.zeros(2, 9, 4)}, "img must be 2 n 3 with n at least 1, got (2, 9, 4)"),
        ({"img": torch.zeros(2, 3, 3, 3)}, "img must be 2 n 3"),
        ({"txt": torch.zeros(2, 0, 7)}, "txt must be 2 n 7 with n at least 1, got (2, 0, 7)"),
        ({"txt": torch.zeros(1, 5, 7)}, "txt must be 2 n 7"),
        (
            {"img_ids": torch.zeros(2, 9, 3)},
            "img_ids must be 2 9 2 or 1 9 2, a position on each of the axes [4, 12]",
        ),
        ({"txt_ids": torch.zeros(2, 4, 2)}, "txt_ids must be 2 5 2"),
        ({"txt_ids": torch.zeros(5, 2)}, "txt_ids must be 2 5 2"),
        ({"img_ids": torch.zeros(2, 9, 2).bfloat16()}, "img_ids must be whole numbers or at least float32"),
        ({"timesteps": torch.zeros(3)}, "timesteps must be one number for each of 2 samples, got (3,)"),
        ({"y": torch.zeros(2, 5)}, "y must be 2 6, got (2, 5)"),
        ({"guidance": None}, "guidance must be 2 numbers, for the model embeds them, got None"),
        ({"guidance": torch.zeros(1)}, "guidance must be one number for each of 2 samples"),
        ({"mask": torch.ones(2, 14)}, "mask must be boolean (2, 14), conditions first, got torch.float32"),
        ({"mask": torch.ones(2, 9, dtype=torch.bool)}, "mask must be boolean (2, 14)"),
    ],
)
def test_unusable_input_is_named(changes: dict[str, Tensor | None], message: str) -> None:
    with pytest.raises(ShapeError) as caught:
        random_model()(**{**inputs(), **changes})
    assert str(caught.value).startswith(message)


def test_flux1_without_y_is_refused() -> None:
    config = replace(PRESETS["flux-schnell"], depth=1, depth_single_blocks=0)
    tokens, text = torch.empty(1, 4, 64, device="meta"), torch.empty(1, 2, 4096, device="meta")
    ids = [torch.zeros(1, count, 3, dtype=torch.long) for count in (4, 2)]
    with pytest.raises(ShapeError, match=r"y must be 1 768 for a model of FLUX\.1's sizes, got None"):
        Flux(config, device="meta")(tokens, ids[0], text, ids[1], torch.zeros(1))


def test_inputs_are_not_changed() -> None:
    given = inputs()
    copies = {name: tensor.clone() for name, tensor in given.items()}
    random_model()(**given)
    assert all(torch.equal(given[name], copies[name]) for name in given)


def test_checkpointed_blocks_give_the_same_gradients() -> None:
    gradients = []
    for runtime in (Runtime(), Runtime(run_block=run_checkpointed)):
        model, given = random_model(), inputs()
        given["img"].requires_grad_()
        model(**given, runtime=runtime).square().mean().backward()
        gradients.append([given["img"].grad, *(parameter.grad for parameter in model.parameters())])
    for plain, checkpointed in zip(*gradients, strict=True):
        assert plain is not None
        assert checkpointed is not None
        assert_close(checkpointed, plain, limit=FORWARD_LIMIT)


@torch.no_grad()
def test_runtime_sees_every_block_and_attention() -> None:
    model, given = random_model(), inputs()
    names: list[tuple[str, int]] = []
    heads: list[tuple[int, ...]] = []

    def run_block(kind: str, index: int, block, x: Tensor) -> Tensor:  # noqa: ANN001 - any call of x
        assert x.shape == (2, 5 + 9, 32)
        names.append((kind, index))
        return block(x)

    def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        heads.append(tuple(q.shape))
        return sdpa(q, k, v, bias)

    runtime = Runtime(run_block=run_block, attention=attention)
    assert torch.equal(model(**given, runtime=runtime), model(**given))
    assert names == [("double", 0), ("double", 1), ("single", 0), ("single", 1), ("single", 2)]
    assert heads == [(2, 2, 14, 16)] * 5


@torch.no_grad()
def test_runtime_replaces_a_block() -> None:
    model, given = random_model(), inputs()
    skipping = Runtime(
        run_block=lambda kind, index, block, x: x if (kind, index) == ("single", 1) else block(x)
    )
    expected = random_model()
    expected.single_blocks[1].linear2.weight.zero_()
    expected.single_blocks[1].linear2.bias.zero_()
    assert_close(model(**given, runtime=skipping), expected(**given), limit=FORWARD_LIMIT)


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "limit"), [(torch.bfloat16, 0.1), (torch.float16, 0.015)])
def test_half_precision(dtype: torch.dtype, limit: float) -> None:
    """Without autocast, in the dtype of the tokens; norms of queries and keys stay in float32."""
    model, given = Flux(CONFIG, dtype=dtype), inputs()
    kept = {name for name, parameter in model.named_parameters() if parameter.dtype == torch.float32}
    assert kept
    assert all(name.endswith("norm.scale") for name in kept)
    model.load_state_dict(random_model().state_dict())
    halved = {name: given[name].to(dtype) for name in ("img", "txt", "y")}
    result = model.eval()(**{**given, **halved})
    assert result.dtype == dtype
    assert_close(result.float(), random_model()(**given), limit=limit)


@torch.no_grad()
def test_float16_stays_finite_beyond_its_range() -> None:
    model, given = random_model(), inputs()
    for block in model.double_blocks:
        block.txt_mlp[2].weight *= 1e4
    model.half()
    halved = {name: given[name].half() for name in ("img", "txt", "y")}
    assert model(**{**given, **halved}).isfinite().all()


@torch.no_grad()
def test_near_times_differ_in_bfloat16() -> None:
    """1000 t in bfloat16 has steps of 4 near 1000; in float32 a step of 0.0005 is seen."""
    model = random_model().bfloat16()
    given = {**inputs(), "guidance": torch.ones(2)}
    halved = {name: given[name].bfloat16() for name in ("img", "txt", "y")}
    near = [model(**{**given, **halved, "timesteps": torch.full((2,), time)}) for time in (0.999, 0.9995)]
    assert not torch.equal(*near)


def test_zero_init_is_the_identity_and_trains() -> None:
    model, given = Flux(CONFIG, init="zero"), inputs()
    result = model(**given)
    assert torch.equal(result, torch.zeros(2, 9, 5))
    assert model.time_in.in_layer.weight.std().item() == pytest.approx(0.02, rel=0.1)
    (result - 1).square().mean().backward()
    assert model.final_layer.linear.bias.grad.abs().min() > 0
    seen: list[Tensor] = []
    model(
        **given,
        runtime=Runtime(run_block=lambda _kind, _index, block, x: seen.append(block(x) - x) or block(x)),
    )
    assert all(torch.equal(change, torch.zeros_like(change)) for change in seen)
    with pytest.raises(ConfigError, match="init must be one of"):
        Flux(CONFIG, init="ones")


def test_reference_init_gives_values_of_order_one() -> None:
    assert 0.05 < Flux(CONFIG)(**inputs()).std().item() < 5


@torch.no_grad()
def test_the_mean_of_the_real_text_stands_in_for_y_where_the_model_is_made_so() -> None:
    model = random_model(replace(CONFIG, vec_in_dim=7, pooled_from_text=True))
    given = {**inputs(), "y": None}
    mask = torch.ones(2, 14, dtype=torch.bool)
    mask[0, 3:5] = False
    mean = torch.stack([given["txt"][0, :3].mean(0), given["txt"][1].mean(0)])
    assert_close(model(**given, mask=mask), model(**{**given, "y": mean}, mask=mask), limit=FORWARD_LIMIT)
    other = model(**{**given, "y": given["txt"].mean(1)}, mask=mask)
    assert not torch.allclose(model(**given, mask=mask), other, atol=1e-3)
    assert_close(model(**given)[1], model(**{**given, "y": given["txt"].mean(1)})[1], limit=FORWARD_LIMIT)


def test_the_mean_must_have_the_width_of_y() -> None:
    with pytest.raises(
        ConfigError, match="vec_in_dim must be context_in_dim = 7 with pooled_from_text, got 6"
    ):
        replace(CONFIG, pooled_from_text=True)
