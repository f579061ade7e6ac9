"""SingleStreamDiT as a whole: sizes, batches, text, masks, hooks, precision, dropout."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from flowcore.errors import ShapeError
from flowcore.layers.attention import sdpa
from flowcore.models.single_stream import PRESETS, SingleStreamConfig, SingleStreamDiT
from flowcore.ops import Runtime, run_checkpointed
from tests.support import FORWARD_LIMIT, assert_close

CONFIG = replace(PRESETS["tiny"], in_channels=4, text_embed_dim=12, max_token_length=8, depth=1)
HEAD = replace(CONFIG, variant="head", fourier_stack_depth=1)
PLAIN = replace(CONFIG, variant="head", use_fourier_in_refiner=False)
VARIANTS = {"v3": CONFIG, "head": HEAD, "plain": PLAIN}


def random_model(config: SingleStreamConfig = CONFIG) -> SingleStreamDiT:
    """A model in which every parameter has an effect."""
    model = SingleStreamDiT(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            mean = 1.0 if "norm" in name or name == "cap_embedder.0.weight" else 0.0
            nn.init.normal_(parameter, mean, 0.2, generator=generator)
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
        ("v3-384", 82_380_758, 499),
        ("v3-768", 271_150_802, 415),
        ("head-768", 208_162_764, 319),
        ("demo", 2_200_452, 110),
    ],
)
def test_sizes_of_presets(preset: str, parameters: int, tensors: int) -> None:
    model = SingleStreamDiT(PRESETS[preset], device="meta")
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert len(model.state_dict()) == tensors


def test_sizes_of_parts() -> None:
    model = SingleStreamDiT(PRESETS["v3-384"], device="meta")

    def count(module: nn.Module) -> int:
        return sum(parameter.numel() for parameter in module.parameters())

    assert count(model.blocks[0]) == 3_547_713
    assert count(model.blocks[0].fourier_filter) == 886_081
    assert count(model.noise_refiner) == 7_095_426
    assert count(model.context_refiner[0]) == 1_770_368
    head = SingleStreamDiT(PRESETS["head-768"], device="meta")
    assert count(head.noise_refiner[0].fourier_filter) == 196_867
    assert count(head.blocks[0]) == 10_630_016


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_untrained_output_is_zero_and_the_last_layer_learns_first(config: SingleStreamConfig) -> None:
    model = SingleStreamDiT(config).eval()
    result = model(*inputs())
    assert not result.any()
    (result + torch.randn_like(result)).square().sum().backward()
    learning = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert learning == {"final_layer.weight", "final_layer.bias"}


def test_initial_values() -> None:
    model = SingleStreamDiT(replace(PRESETS["tiny"], hidden_size=128, fourier_gate=0.1))
    block = model.blocks[0]
    for weight in (block.attention_q.weight, block.feed_forward.w3.weight, block.local_bias.conv.weight):
        assert weight.std().item() == pytest.approx(0.02, rel=0.1)
    for parameter in (*block.adaLN_modulation[1].parameters(), block.local_bias.conv.bias):
        assert not parameter.any()
    mlp = block.fourier_filter.freq_mlp
    assert not mlp[2].weight.any()
    assert mlp[0].weight.abs().max().item() == pytest.approx((6 / (256 + 192)) ** 0.5, rel=0.01)
    assert mlp[0].bias.any()
    assert model.x_embedder.bias.any()
    assert not model.t_embedder[2].bias.any()
    assert block.fourier_filter.gate.item() == pytest.approx(0.1)
    gain = SingleStreamDiT(HEAD).final_fourier_blocks[0].filter
    assert (gain.raw_cutoff.item(), gain.raw_scale.item()) == (-1, 3)
    assert gain.low_mlp[2].weight.abs().max().item() <= 0.1 * (6 / (64 + 64)) ** 0.5


@torch.no_grad()
@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_batch_of_two_equals_two_of_one(config: SingleStreamConfig) -> None:
    model = random_model(config)
    latents, times, text = inputs()
    single = [model(latents[i : i + 1], times[i : i + 1], text[i : i + 1]) for i in range(2)]
    assert_close(model(latents, times, text), torch.cat(single), limit=FORWARD_LIMIT)


@torch.no_grad()
def test_inputs_are_not_changed() -> None:
    given = inputs()
    copies = [part.clone() for part in given]
    random_model(HEAD)(*given, text_mask=torch.tensor([[True] * 5, [True, False, False, False, False]]))
    assert all(torch.equal(part, copy) for part, copy in zip(given, copies, strict=True))


@torch.no_grad()
def test_masked_text_has_no_influence() -> None:
    model = random_model()
    latents, times, text = inputs()
    mask = torch.tensor([[True, True, True, False, False]] * 2)
    expected = model(latents, times, text[:, :3])
    actual = model(latents, times, text, text_mask=mask)
    assert_close(actual, expected, limit=FORWARD_LIMIT)
    other = text.clone()
    other[:, 3:] = 1e3
    assert torch.equal(model(latents, times, other, text_mask=mask), actual)
    assert not torch.equal(model(latents, times, text), actual)


@torch.no_grad()
def test_without_a_mask_padding_is_seen() -> None:
    model = random_model()
    latents, times, text = inputs()
    padded = nn.functional.pad(text, (0, 0, 0, 2))
    assert not torch.allclose(model(latents, times, padded), model(latents, times, text), atol=1e-3)
    everything = torch.ones(2, 7, dtype=torch.bool)
    assert_close(
        model(latents, times, padded, text_mask=everything),
        model(latents, times, padded),
        limit=FORWARD_LIMIT,
    )


@torch.no_grad()
def test_text_that_is_masked_altogether_gives_numbers() -> None:
    model = random_model()
    latents, times, text = inputs()
    mask = torch.tensor([[True] * 5, [False] * 5])
    result = model(latents, times, text, text_mask=mask)
    assert result.isfinite().all()
    alone = model(latents[1:], times[1:], text[1:, :1])
    assert_close(result[1:], alone, limit=FORWARD_LIMIT)


@torch.no_grad()
def test_zero_text_is_no_text() -> None:
    model = random_model()
    latents, times, text = inputs(tokens=8)
    text[1] = 0
    result = model(latents, times, text)
    assert_close(result[1:], model(latents[1:], times[1:]), limit=FORWARD_LIMIT)
    with torch.no_grad():
        model.cap_pad_token += 1
    changed = model(latents, times, text)
    assert_close(changed[:1], result[:1], limit=FORWARD_LIMIT)
    assert not torch.allclose(changed[1], result[1], atol=1e-3)
    text[1, 0, 0] = 1e-30  # a single number is text
    assert not torch.allclose(model(latents, times, text)[1], changed[1], atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize(("height", "width"), [(6, 6), (6, 14), (10, 8)])
def test_sizes(config: SingleStreamConfig, height: int, width: int) -> None:
    model = random_model(config)
    latents, times, text = inputs(height=height, width=width)
    result = model(latents, times, text)
    assert result.shape == latents.shape
    turned = model(latents.mT.contiguous(), times, text).mT
    assert not torch.allclose(turned, result, atol=1e-3)


@torch.no_grad()
def test_smallest_sizes() -> None:
    for config, least in ((CONFIG, 2), (PLAIN, 4), (HEAD, 6)):
        model = random_model(config)
        assert model(*inputs(height=least, width=least)).isfinite().all()
        if least > 2:
            with pytest.raises(
                ShapeError, match=f"width of the latents must be at least {least}, got {least - 2}"
            ):
                model(*inputs(height=least, width=least - 2))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(2, 3, 8, 12)}, "latents must be b 4 h w, got (2, 3, 8, 12)"),
        (
            {"x": torch.zeros(2, 4, 7, 12)},
            "height of the latents must be a multiple of 2, got 7; nearest are 6 and 8",
        ),
        ({"t": torch.zeros(3)}, "times must be one for each of 2 samples"),
        ({"text_embeds": torch.zeros(2, 5, 13)}, "text_embeds must be 2 m 12, got (2, 5, 13)"),
        ({"text_embeds": torch.zeros(1, 5, 12)}, "text_embeds must be 2 m 12, got (1, 5, 12)"),
        ({"text_embeds": torch.zeros(2, 9, 12)}, "text_embeds must have 1 to 8 tokens, got 9"),
        ({"text_mask": torch.ones(2, 4, dtype=torch.bool)}, "text_mask must be boolean (2, 5)"),
        ({"text_mask": torch.ones(2, 5)}, "text_mask must be boolean (2, 5)"),
        ({"text_embeds": None, "text_mask": torch.ones(2, 5, dtype=torch.bool)}, "text_mask must come with"),
    ],
)
def test_unusable_input_is_named(changes: dict[str, Tensor | None], message: str) -> None:
    latents, times, text = inputs()
    arguments = {"x": latents, "t": times, "text_embeds": text} | changes
    with pytest.raises(ShapeError) as caught:
        random_model()(**arguments)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("config", [replace(CONFIG, dropout=0.3), HEAD], ids=["v3 with dropout", "head"])
def test_checkpointed_blocks_give_the_same_gradients(config: SingleStreamConfig) -> None:
    gradients = []
    for runtime in (Runtime(), Runtime(run_block=run_checkpointed)):
        model = random_model(config).train()
        result = model(*inputs(), generator=torch.Generator().manual_seed(3), runtime=runtime)
        result.square().mean().backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    plain, checkpointed = gradients
    assert {name for name, gradient in plain.items() if gradient is None} == {
        "x_pad_token",
        "cap_pad_token",
    } - {name for name, gradient in plain.items() if gradient is not None}
    for name, gradient in plain.items():
        if gradient is not None:
            assert checkpointed[name] is not None
            assert_close(checkpointed[name], gradient, limit=FORWARD_LIMIT, what=name)


def test_dropout_follows_the_generator_in_training_only() -> None:
    model = random_model(replace(CONFIG, dropout=0.3))
    still = model(*inputs())

    def dropped(seed: int) -> Tensor:
        return model.train()(*inputs(), generator=torch.Generator().manual_seed(seed))

    assert torch.equal(dropped(3), dropped(3))
    assert not torch.equal(dropped(3), dropped(4))
    assert not torch.equal(dropped(3), still)
    with pytest.raises(
        ShapeError, match=r"generator must be given in training with dropout, got None with 0\.3"
    ):
        model.train()(*inputs())
    assert torch.equal(model.eval()(*inputs()), still)
    random_model().train()(*inputs())  # no dropout, no generator


@torch.no_grad()
def test_runtime_sees_every_block_and_attention() -> None:
    model = random_model(replace(CONFIG, depth=2))
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
    assert names == [("noise_refiner", 0), ("context_refiner", 0), ("blocks", 0), ("blocks", 1)]
    assert heads == [(2, 2, 24, 16), (2, 2, 5, 16), (2, 2, 29, 16), (2, 2, 29, 16)]


@torch.no_grad()
def test_runtime_replaces_a_block() -> None:
    model = random_model()
    skipping = Runtime(run_block=lambda kind, _index, block, x: x if kind == "noise_refiner" else block(x))
    assert not torch.equal(model(*inputs(), runtime=skipping), model(*inputs()))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_half_precision_keeps_norms_and_filters_in_float32(
    config: SingleStreamConfig, dtype: torch.dtype
) -> None:
    model = SingleStreamDiT(config, dtype=dtype)
    kept = {name for name, parameter in model.named_parameters() if parameter.dtype == torch.float32}
    exact = ("norm", "fourier_filter.", ".filter.", "cap_embedder.0.")
    assert kept == {name for name, _ in model.named_parameters() if any(part in name for part in exact)}
    state = random_model(config).state_dict()
    model.load_state_dict({name: tensor * (1.0 if name in kept else 0.3) for name, tensor in state.items()})
    reference = SingleStreamDiT(config)
    reference.load_state_dict(model.state_dict())  # the same rounded weights
    latents, times, text = inputs()
    result = model.eval()(latents.to(dtype), times, text.to(dtype))
    assert result.dtype == dtype
    expected = reference.eval()(latents.to(dtype).float(), times, text.to(dtype).float())
    limit = {torch.bfloat16: 6e-2, torch.float16: 1e-2}[dtype]
    assert_close(result.float(), expected, limit=limit)


@torch.no_grad()
@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_a_model_moved_to_half_precision_as_a_whole_runs(config: SingleStreamConfig) -> None:
    latents, times, text = inputs()
    result = random_model(config).to(torch.bfloat16)(latents.bfloat16(), times, text.bfloat16())
    assert result.isfinite().all()


@torch.no_grad()
def test_shapes_on_the_meta_device() -> None:
    for config in VARIANTS.values():
        model = SingleStreamDiT(replace(config, dropout=0.1), device="meta").train()
        latents, times, text = (part.to("meta") for part in inputs())
        assert model(latents, times, text, generator=torch.Generator()).shape == latents.shape
