"""XUDiT as a whole: batches, masks, sizes, routing, conditions, hooks, precision."""

import re
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from flowcore.errors import ShapeError
from flowcore.layers.attention import sdpa
from flowcore.models.xut import PRESETS, TreadConfig, XUDiT, XUTConfig
from flowcore.ops import Runtime, run_checkpointed
from tests.support import FORWARD_LIMIT, assert_close

CONFIG = XUTConfig(dim=32, ctx_dim=12, ctx_size=4, heads=4, dim_head=8, mlp_dim=48, depth=2)
TREAD = replace(CONFIG, tread_config=TreadConfig(prev_trns_depth=1, post_trns_depth=1, dropout_ratio=0.5))


def random_model(config: XUTConfig = CONFIG) -> XUDiT:
    """A model in which every parameter has an effect."""
    model = XUDiT(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            nn.init.normal_(parameter, 1.0 if "norm.weight" in name else 0.0, 0.2, generator=generator)
    return model.eval()


def inputs(
    batch: int = 2, height: int = 8, width: int = 12, tokens: int = 5
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(batch, 4, height, width, generator=generator)
    times = torch.rand(batch, generator=generator)
    return latents, times, torch.randn(batch, tokens, 12, generator=generator)


@pytest.mark.parametrize(
    ("preset", "parameters", "tensors"),
    [
        ("xut-small", 190_568_720, 171),
        ("xut-large-640", 464_146_448, 211),
        ("hdm-xut-small", 237_290_128, 215),
        ("hdm-xut-340m", 343_176_208, 255),
        ("hdm-xut-large", 555_628_816, 255),
        ("demo", 2_257_216, 99),
        ("tiny", 571_856, 119),
    ],
)
def test_sizes_of_presets(preset: str, parameters: int, tensors: int) -> None:
    model = XUDiT(PRESETS[preset], device="meta")
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert len(model.state_dict()) == tensors


@pytest.mark.parametrize(
    ("changes", "parameters"),
    [
        ({"shared_adaln": False}, 219_521_168),
        ({"concat_ctx": False}, 201_013_392),
        ({"concat_ctx": False, "dec_ctx": True}, 212_032_400),
        ({"dec_blocks": 3}, 236_484_624),
    ],
)
def test_sizes_of_variants_of_small(changes: dict[str, object], parameters: int) -> None:
    model = XUDiT(replace(PRESETS["xut-small"], **changes), device="meta")
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


def test_initial_output_is_nearly_zero_and_heads_are_neutral() -> None:
    model = XUDiT(CONFIG).eval()
    assert model(*inputs()).abs().max() < 0.5
    shared = model.embed(*inputs()).signals.shared
    assert shared is not None
    assert all((triple.scale == 1).all() and (triple.gate == 1).all() for triple in shared)


@torch.no_grad()
@pytest.mark.parametrize("changes", [{}, {"concat_ctx": False, "dec_ctx": True}, {"shared_adaln": False}])
def test_batch_of_two_equals_two_of_one(changes: dict[str, bool]) -> None:
    model = random_model(replace(CONFIG, **changes))
    latents, times, context = inputs()
    single = [model(latents[i : i + 1], times[i : i + 1], context[i : i + 1]) for i in range(2)]
    assert_close(model(latents, times, context), torch.cat(single), limit=FORWARD_LIMIT)


@torch.no_grad()
@pytest.mark.parametrize("concat", [True, False])
def test_masked_context_has_no_influence(concat: bool) -> None:
    model = random_model(replace(CONFIG, concat_ctx=concat))
    latents, times, context = inputs()
    mask = torch.tensor([[True, True, True, False, False], [True, True, True, False, False]])
    expected = model(latents, times, context[:, :3])
    actual = model(latents, times, context, ctx_mask=mask)
    assert_close(actual, expected, limit=FORWARD_LIMIT)
    context[:, 3:] = 1e3
    assert torch.equal(model(latents, times, context, ctx_mask=mask), actual)
    assert not torch.equal(model(latents, times, context), actual)


@torch.no_grad()
def test_missing_context_is_zero_rows() -> None:
    model = random_model()
    latents, times, _ = inputs()
    assert torch.equal(model(latents, times), model(latents, times, torch.zeros(2, 4, 12)))
    textless = random_model(replace(CONFIG, ctx_dim=None))
    assert textless(latents, times).shape == latents.shape


@torch.no_grad()
@pytest.mark.parametrize(("height", "width"), [(7, 9), (1, 5), (8, 3)])
def test_odd_sizes_are_padded_and_cropped(height: int, width: int) -> None:
    model = random_model()
    latents, times, context = inputs(height=height, width=width)
    result = model(latents, times, context)
    assert result.shape == latents.shape
    rows, columns = torch.arange(height + height % 2) % height, torch.arange(width + width % 2) % width
    padded = latents[:, :, rows][..., columns]
    assert torch.equal(model(padded, times, context)[..., :height, :width], result)


@torch.no_grad()
def test_transposed_image_is_another_image() -> None:
    model = random_model()
    latents, times, context = inputs()
    turned = model(latents.mT.contiguous(), times, context).mT
    assert not torch.allclose(turned, model(latents, times, context), atol=1e-3)


@torch.no_grad()
def test_routing_follows_rate_and_generator() -> None:
    model = random_model(TREAD)
    arguments = inputs()
    whole = model(*arguments)
    assert torch.equal(model(*arguments, tread_rate=0.0), whole)

    def routed(seed: int, rate: float) -> Tensor:
        return model(*arguments, tread_rate=rate, generator=torch.Generator().manual_seed(seed))

    assert torch.equal(routed(3, 0.5), routed(3, 0.5))
    assert not torch.equal(routed(3, 0.5), routed(4, 0.5))
    assert not torch.equal(routed(3, 0.5), whole)
    assert torch.equal(routed(3, 0.01), whole)  # int(24 * 0.01) tokens = none


@torch.no_grad()
def test_training_routes_by_the_configured_share() -> None:
    model = random_model(TREAD).train()
    arguments = inputs()
    seen = []
    model.backbone.register_forward_hook(lambda _module, given, _output: seen.append(given[0].shape[1]))
    model(*arguments, generator=torch.Generator())
    model(*arguments, tread_rate=0.0)
    model(*arguments, tread_rate=0.25, generator=torch.Generator())
    assert seen == [12 + 5, 24 + 5, 18 + 5]
    with pytest.raises(ShapeError, match="generator must be given"):
        model(*arguments)
    random_model(
        replace(TREAD, tread_config=TreadConfig(prev_trns_depth=0, post_trns_depth=1, dropout_ratio=0.0))
    )


@torch.no_grad()
def test_routed_batch_keeps_masked_text_out() -> None:
    model = random_model(TREAD)
    latents, times, context = inputs()
    mask = torch.tensor([[True] * 3 + [False] * 2] * 2)

    def routed(text: Tensor, keep: Tensor | None) -> Tensor:
        return model(
            latents, times, text, ctx_mask=keep, tread_rate=0.5, generator=torch.Generator().manual_seed(1)
        )

    assert_close(routed(context, mask), routed(context[:, :3], None), limit=FORWARD_LIMIT)


@torch.no_grad()
def test_transform_returns_the_encoder_output_of_image_tokens() -> None:
    model = random_model(TREAD)
    stream = model.embed(*inputs())
    tokens, encoded = model.transform(stream)
    assert (tokens.shape, encoded.shape) == ((2, 29, 32), (2, 24, 32))
    _, encoded = model.transform(stream, tread_rate=0.5, generator=torch.Generator())
    assert encoded.shape == (2, 12, 32)


@torch.no_grad()
def test_class_ids_choose_the_condition() -> None:
    model = random_model(replace(CONFIG, class_cond=3, ctx_dim=None))
    latents, times, _ = inputs()
    first = model(latents, times, torch.tensor([0, 2]))
    assert torch.equal(first[0], model(latents, times, torch.tensor([0, 1]))[0])
    assert not torch.equal(first[1], model(latents, times, torch.tensor([0, 1]))[1])
    assert not torch.equal(first, model(latents, times))
    with pytest.raises(ShapeError, match="class ids must be 2 integers"):
        model(latents, times, torch.tensor([0.0, 1.0]))


@torch.no_grad()
def test_second_time_and_addon_change_the_result() -> None:
    model = random_model(replace(CONFIG, double_t=True, addon_info_embs_dim=1))
    arguments = inputs()
    plain = model(*arguments)
    assert not torch.equal(plain, model(*arguments, r=torch.tensor([0.1, 0.2])))
    flat = model(*arguments, addon_info=torch.tensor([0.3, 0.4]))
    assert not torch.equal(plain, flat)
    assert torch.equal(flat, model(*arguments, addon_info=torch.tensor([[0.3], [0.4]])))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(2, 3, 8, 12)}, "latents must be b 4 h w, got (2, 3, 8, 12)"),
        ({"t": torch.zeros(3)}, "times must be one for each of 2 samples"),
        ({"ctx": torch.zeros(2, 5, 13)}, "ctx must be 2 m 12, got (2, 5, 13)"),
        ({"ctx_mask": torch.ones(2, 4, dtype=torch.bool)}, "ctx_mask must be boolean (2, 5)"),
        ({"ctx_mask": torch.ones(2, 5)}, "ctx_mask must be boolean (2, 5)"),
        ({"ctx": None, "ctx_mask": torch.ones(2, 5, dtype=torch.bool)}, "ctx_mask must come with ctx"),
        ({"pos_map": torch.zeros(2, 24, 2)}, "pos_map must be 2 96 2"),
        ({"r": torch.zeros(2)}, "r must be absent"),
        ({"addon_info": torch.zeros(2)}, "addon_info must be absent"),
        ({"tread_rate": 1.0}, "tread_rate must be in [0, 1), got 1.0"),
    ],
)
def test_unusable_input_is_named(changes: dict[str, Tensor | None], message: str) -> None:
    latents, times, context = inputs()
    arguments = {"x": latents, "t": times, "ctx": context} | changes
    with pytest.raises(ShapeError) as caught:
        random_model(TREAD)(**arguments)
    assert str(caught.value).startswith(message)


def test_text_for_a_model_without_text_is_refused() -> None:
    with pytest.raises(ShapeError, match="ctx must be absent"):
        random_model(replace(CONFIG, ctx_dim=None))(*inputs())


def test_checkpointed_blocks_give_the_same_gradients() -> None:
    gradients = []
    for run_block in (None, run_checkpointed):
        model = random_model(TREAD)
        runtime = Runtime() if run_block is None else Runtime(run_block=run_block)
        model(*inputs(), runtime=runtime).square().mean().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        assert plain is not None
        assert checkpointed is not None
        assert_close(checkpointed, plain, limit=FORWARD_LIMIT)


@torch.no_grad()
def test_runtime_sees_every_block_and_attention() -> None:
    model = random_model(TREAD)
    names: list[tuple[str, int]] = []
    heads: list[tuple[int, ...]] = []

    def run_block(kind: str, index: int, block, x: Tensor) -> Tensor:  # noqa: ANN001 - any call of x
        names.append((kind, index))
        return block(x)

    def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        heads.append(tuple(q.shape))
        return sdpa(q, k, v, bias)

    runtime = Runtime(run_block=run_block, attention=attention)
    assert torch.equal(model(*inputs(), runtime=runtime), model(*inputs()))
    blocks = [("pre", 0), ("enc", 0), ("enc", 1), ("dec", 0), ("dec", 1), ("dec", 2), ("dec", 3), ("post", 0)]
    assert names == blocks
    assert heads == [(2, 4, 29, 8)] * (8 + 2)  # two decoder stages begin with a second attention


@torch.no_grad()
def test_runtime_replaces_a_block() -> None:
    model = random_model()
    skipping = Runtime(run_block=lambda kind, index, block, x: x if (kind, index) == ("dec", 3) else block(x))
    assert not torch.equal(model(*inputs(), runtime=skipping), model(*inputs()))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_for_the_matrices_of_the_blocks(dtype: torch.dtype) -> None:
    model = XUDiT(CONFIG, dtype=dtype)
    matrices = re.compile(r".*_blocks\..*\.(attn|xattn|mlp)\.(qkv|q|kv|out|w12|w3)\.(weight|bias)")
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (dtype if matrices.fullmatch(name) else torch.float32), name
    model.load_state_dict(random_model().state_dict())
    latents, times, context = inputs()
    result = model.eval()(latents.to(dtype), times, context.to(dtype))
    assert result.dtype == dtype
    # Rounding the matrices to bfloat16 alone moves this random model by 0.3; float16 is 8 times as fine.
    limit = {torch.bfloat16: 0.6, torch.float16: 0.15}[dtype]
    assert_close(result.float(), random_model()(latents, times, context), limit=limit)


@torch.no_grad()
def test_near_times_differ_in_bfloat16() -> None:
    """1000 t in bfloat16 has steps of 4 near 1000; in float32 a step of 0.0005 is seen."""
    model = XUDiT(CONFIG, dtype=torch.bfloat16)
    vectors = model.time_emb(torch.tensor([0.999, 0.9995]))
    assert not torch.equal(vectors[0], vectors[1])


def test_stored_time_frequencies_are_not_read() -> None:
    model = random_model()
    state = model.state_dict()
    expected = state["time_emb.freqs"].clone()
    state["time_emb.freqs"] = expected.half()
    other = XUDiT(CONFIG)
    other.load_state_dict(state)
    assert torch.equal(other.time_emb.freqs, expected)
    del state["time_emb.freqs"]
    XUDiT(CONFIG).load_state_dict(state)


@torch.no_grad()
def test_prenorm_and_self_attending_skips_are_other_functions() -> None:
    results = [
        random_model(replace(CONFIG, residual=residual, skip_source=source))(*inputs())
        for residual in ("normed", "prenorm")
        for source in ("encoder", "self")
    ]
    assert all(not torch.allclose(a, b) for i, a in enumerate(results) for b in results[:i])
