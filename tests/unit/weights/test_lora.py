"""LoRA files: every form of key, merging and taking off, writing, and files that do not fit."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from flowcore.errors import CheckpointError
from flowcore.models import find_architecture
from flowcore.models.flux import Flux
from flowcore.models.flux.layouts import from_diffusers, to_diffusers
from flowcore.models.xut import PRESETS as XUT_PRESETS
from flowcore.models.xut import XUDiT
from flowcore.weights.lora import load_lora, merge, merged_tensors, parse_lora, restore
from flowcore.weights.lora_writing import lora_tensors
from tests.support import assert_close

from .loras import (
    ALPHA,
    CONFIG,
    LIMIT,
    LINEAR1,
    PROJ,
    QKV,
    RANK,
    ROW,
    draw,
    pair,
    parse,
    random_state,
)


@pytest.fixture
def state() -> dict[str, Tensor]:
    return random_state()


def change_of(tensors: dict[str, Tensor], state: dict[str, Tensor], name: str, **metadata: str) -> Tensor:
    lora = parse(tensors, state, **metadata)
    assert lora.unused == ()
    return merged_tensors(state, lora)[name] - state[name]


FLAT = PROJ.replace(".", "_")
THEIRS = "transformer_blocks.0.attn.to_add_out"


@pytest.mark.parametrize(
    "form",
    [
        f"lora_unet_{FLAT}.lora_down.weight",
        f"transformer.{THEIRS}.lora_A.weight",
        f"{THEIRS}.lora_A.weight",
        f"base_model.model.{THEIRS}.lora_A.default.weight",
        f"transformer.base_model.model.{THEIRS}.lora_A.weight",
        f"pipe.transformer.{THEIRS}.lora_A.weight",
        f"unet.{THEIRS}.lora_A.weight",
        f"lora_transformer_{THEIRS.replace('.', '_')}.lora_down.weight",
        f"lycoris_{THEIRS.replace('.', '_')}.lora_down.weight",
        f"lycoris_model_{FLAT}.lora_down.weight",
        f"diffusion_model.{PROJ}.lora_A.weight",
        f"diffusion_model.{PROJ}.lora_down.weight",
        f"diffusion_model.{PROJ}.lora.down.weight",
        f"diffusion_model.{THEIRS}.lora_A.weight",
        f"model.diffusion_model.{PROJ}.lora_A.weight",
        f"{PROJ}.lora_A.weight",
        f"{PROJ}.lora_A",
        f"base_model.model.{PROJ}.lora_A.weight",
        "double_blocks.0.processor.proj_lora2.down.weight",
    ],
)
def test_every_form_of_key(form: str, state: dict[str, Tensor]) -> None:
    adapter = pair(PROJ, state)
    up = form.replace("lora_down", "lora_up").replace("lora_A", "lora_B").replace(".down.", ".up.")
    module = form.removesuffix(".weight").removesuffix(".default")
    module = (
        module.removesuffix(".lora_A").removesuffix(".lora_down").removesuffix(".down").removesuffix(".lora")
    )
    tensors = {form: adapter.down, up: adapter.up, f"{module}.alpha": torch.tensor(ALPHA)}
    expected = ALPHA / RANK * adapter.up @ adapter.down
    assert_close(change_of(tensors, state, f"{PROJ}.weight"), expected, limit=LIMIT)


def test_alpha_is_the_rank_where_nothing_tells(state: dict[str, Tensor]) -> None:
    adapter = pair(PROJ, state)
    tensors = {f"{PROJ}.lora_A.weight": adapter.down, f"{PROJ}.lora_B.weight": adapter.up}
    assert_close(change_of(tensors, state, f"{PROJ}.weight"), adapter.up @ adapter.down, limit=LIMIT)


@pytest.mark.parametrize(
    ("settings", "alpha"),
    [
        ({"transformer.r": RANK, "transformer.lora_alpha": 12}, 12.0),
        ({"r": RANK, "lora_alpha": 12, "use_rslora": True}, 12.0 * RANK**0.5),
        ({"lora_alpha": 1, "alpha_pattern": {"attn.to_add_out": 9}}, 9.0),
        ({"transformer.lora_alpha": 5, "transformer.alpha_pattern": {"attn.to_q": 9}}, 5.0),
    ],
)
def test_alpha_of_peft_is_in_the_metadata(settings: dict, alpha: float, state: dict[str, Tensor]) -> None:
    adapter = pair(PROJ, state)
    tensors = {
        f"transformer.{THEIRS}.lora_A.weight": adapter.down,
        f"transformer.{THEIRS}.lora_B.weight": adapter.up,
    }
    change = change_of(tensors, state, f"{PROJ}.weight", lora_adapter_metadata=json.dumps(settings))
    assert_close(change, alpha / RANK * adapter.up @ adapter.down, limit=LIMIT)


def test_parts_of_fused_layers_change_their_rows(state: dict[str, Tensor]) -> None:
    down, up = draw(RANK, 16), draw(16, RANK)
    tensors = {
        "transformer.transformer_blocks.0.attn.to_k.lora_A.weight": down,
        "transformer.transformer_blocks.0.attn.to_k.lora_B.weight": up,
    }
    change = change_of(tensors, state, f"{QKV}.weight")
    assert_close(change[16:32], up @ down, limit=LIMIT)
    assert not change[:16].any()
    assert not change[32:].any()
    mlp = {
        "transformer.single_transformer_blocks.0.proj_mlp.lora_A.weight": down,
        "transformer.single_transformer_blocks.0.proj_mlp.lora_B.weight": draw(64, RANK),
    }
    change = change_of(mlp, state, f"{LINEAR1}.weight")
    assert_close(change[48:], draw(64, RANK) @ down, limit=LIMIT)
    assert not change[:48].any()
    for name in (
        "diffusion_model.single_blocks.0.linear1_qkv.lora_%s",
        "single_blocks.0.processor.qkv_lora.%s",
    ):
        kinds = ("down.weight", "up.weight")
        first = {name % kinds[0]: down, name % kinds[1]: draw(48, RANK)}
        change = change_of(first, state, f"{LINEAR1}.weight")
        assert_close(change[:48], draw(48, RANK) @ down, limit=LIMIT)
        assert not change[48:].any()


def test_merging_by_other_names_equals_changing_the_weights_there(state: dict[str, Tensor]) -> None:
    """A LoRA on every layer of diffusers, the swapped one too, against the sum in diffusers' own layout."""
    foreign = to_diffusers(state, CONFIG)
    tensors, expected = {}, dict(foreign)
    for name, weight in foreign.items():
        if weight.ndim == 2:
            layer = name.removesuffix(".weight")
            down, up = (
                draw(RANK, weight.shape[1], seed=len(name)),
                draw(weight.shape[0], RANK, seed=len(name)),
            )
            tensors |= {f"transformer.{layer}.lora_A.weight": down, f"transformer.{layer}.lora_B.weight": up}
            expected[name] = weight + 0.5 * up @ down
    lora = parse(tensors, state)
    assert lora.unused == ()
    actual = {**state, **merged_tensors(state, lora, 0.5)}
    for name, tensor in from_diffusers(expected).items():
        assert_close(actual[name], tensor, limit=LIMIT, what=name)


def test_taking_off_gives_the_same_bits(state: dict[str, Tensor]) -> None:
    model = Flux(CONFIG, dtype=torch.bfloat16)
    model.load_state_dict(state)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    layers = (QKV, PROJ, LINEAR1)
    lora = parse(lora_tensors({layer: pair(layer, state) for layer in layers}, architecture=ROW), state)
    originals = merge(model, lora, 0.7)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == set(originals) == {f"{layer}.weight" for layer in layers}
    assert model.double_blocks[0].img_attn.qkv.weight.dtype == torch.bfloat16
    restore(model, originals)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_strength_zero_and_negative(state: dict[str, Tensor]) -> None:
    lora = parse(lora_tensors({PROJ: pair(PROJ, state)}, architecture=ROW), state)
    name = f"{PROJ}.weight"
    assert torch.equal(merged_tensors(state, lora, 0.0)[name], state[name])
    plus, minus = (merged_tensors(state, lora, strength)[name] for strength in (1.0, -1.0))
    assert_close((plus + minus) / 2, state[name], limit=LIMIT)


def test_differences_biases_and_replacements(state: dict[str, Tensor]) -> None:
    scale = "double_blocks.0.img_attn.norm.query_norm.scale"
    tensors = {
        f"diffusion_model.{PROJ}.diff": draw(16, 16),
        f"diffusion_model.{PROJ}.diff_b": draw(16),
        f"diffusion_model.{scale}.diff": draw(16),
        "single_blocks.0.norm.key_norm.scale": draw(16, seed=1),
        "diffusion_model.single_blocks.0.norm.query_norm.scale.set_weight": draw(16, seed=2),
    }
    lora = parse(tensors, state)
    assert lora.unused == ()
    merged = merged_tensors(state, lora, 0.5)
    assert_close(merged[f"{PROJ}.weight"], state[f"{PROJ}.weight"] + 0.5 * draw(16, 16), limit=LIMIT)
    assert_close(merged[f"{PROJ}.bias"], state[f"{PROJ}.bias"] + 0.5 * draw(16), limit=LIMIT)
    assert_close(merged[scale], state[scale] + 0.5 * draw(16), limit=LIMIT)
    assert torch.equal(merged["single_blocks.0.norm.key_norm.scale"], draw(16, seed=1))
    assert torch.equal(merged["single_blocks.0.norm.query_norm.scale"], draw(16, seed=2))


def hadamard() -> tuple[dict[str, Tensor], Tensor]:
    parts = {
        f"hada_w{i}_{side}": draw(*((16, 2) if side == "a" else (2, 16)), seed=i)
        for i in (1, 2)
        for side in "ab"
    }
    product = (parts["hada_w1_a"] @ parts["hada_w1_b"]) * (parts["hada_w2_a"] @ parts["hada_w2_b"])
    return parts, ALPHA / 2 * product


def kronecker(is_full: bool) -> tuple[dict[str, Tensor], Tensor]:
    first, second = draw(4, 4), {"lokr_w2_a": draw(4, 2), "lokr_w2_b": draw(2, 4)}
    if is_full:
        return {"lokr_w1": first, "lokr_w2": draw(4, 4, seed=3)}, torch.kron(first, draw(4, 4, seed=3))
    return {"lokr_w1": first, **second}, ALPHA / 2 * torch.kron(
        first, second["lokr_w2_a"] @ second["lokr_w2_b"]
    )


@pytest.mark.parametrize("make", [hadamard, lambda: kronecker(False), lambda: kronecker(True)])
def test_products_of_lycoris(
    make: Callable[[], tuple[dict[str, Tensor], Tensor]], state: dict[str, Tensor]
) -> None:
    parts, expected = make()
    layer = f"lycoris_{THEIRS.replace('.', '_')}"
    tensors = {f"{layer}.{role}": tensor for role, tensor in parts.items()} | {
        f"{layer}.alpha": torch.tensor(ALPHA)
    }
    assert_close(change_of(tensors, state, f"{PROJ}.weight"), expected, limit=LIMIT)


@pytest.mark.parametrize("axis", ["rows", "columns", "vector"])
def test_magnitudes(axis: str, state: dict[str, Tensor]) -> None:
    """At strength 1 the rows (columns) of the sum have the given lengths; at 0 nothing changes."""
    adapter, name = pair(PROJ, state), f"{PROJ}.weight"
    lengths = draw(16).abs() + 1
    magnitude = {"rows": lengths[:, None], "columns": lengths[None], "vector": lengths}[axis]
    key = "lora_magnitude_vector" if axis == "vector" else "dora_scale"
    tensors = {
        f"lora_unet_{FLAT}.lora_down.weight": adapter.down,
        f"lora_unet_{FLAT}.lora_up.weight": adapter.up,
        f"lora_unet_{FLAT}.alpha": torch.tensor(ALPHA),
        f"lora_unet_{FLAT}.{key}": magnitude,
    }
    lora = parse(tensors, state)
    total = state[name] + ALPHA / RANK * adapter.up @ adapter.down
    dim = 0 if axis == "columns" else 1
    expected = (
        total / total.norm(dim=dim, keepdim=True) * (lengths[None] if axis == "columns" else lengths[:, None])
    )
    assert_close(merged_tensors(state, lora)[name], expected, limit=LIMIT)
    assert torch.equal(merged_tensors(state, lora, 0.0)[name], state[name])
    half = state[name] + 0.5 * (expected - state[name])
    assert_close(merged_tensors(state, lora, 0.5)[name], half, limit=LIMIT)


def test_keys_of_other_models_are_listed(state: dict[str, Tensor]) -> None:
    tensors = lora_tensors({PROJ: pair(PROJ, state)}, architecture=ROW)
    strange = [
        "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight",
        "diffusion_model.no.lora_A.weight",
    ]
    lora = parse({**tensors, **{key: torch.zeros(1) for key in strange}}, state)
    assert lora.unused == tuple(strange)
    assert lora.report == f"file: 1 changes, 2 unused keys ({strange[0]}, {strange[1]})"


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (
            {"a.lora_A.weight": draw(2, 2)},
            "file must be a LoRA for this flux model, got a LoRA (1 tensors such as a.lora_A",
        ),
        (
            {f"{PROJ}.lora_A.weight": draw(2, 16)},
            f"{PROJ} must have all tensors of its adapter, got down alone",
        ),
        (
            {f"{PROJ}.lora_A.weight": draw(2, 15), f"{PROJ}.lora_B.weight": draw(16, 2)},
            f"{PROJ} must change {PROJ}.weight in the shape (16, 16), got (16, 15)",
        ),
        (
            {f"{PROJ}.lora_A.weight": draw(2, 16), f"{PROJ}.lora_B.weight": draw(16, 3)},
            f"the factors of {PROJ} must share their rank, got (16, 3) and (2, 16)",
        ),
        (
            {
                f"{PROJ}.lora_A.weight": draw(2, 16),
                f"{PROJ}.lora_B.weight": draw(16, 2),
                f"{PROJ}.dora_scale": draw(5, 1),
            },
            f"magnitudes of {PROJ} must have shape (16, 1), got (5, 1)",
        ),
        (
            {"img_in.lora_A.weight": draw(2, 8), "img_in.lora_B.weight": draw(16, 2)},
            "img_in must change img_in.weight",
        ),
    ],
)
def test_unusable_files_are_named(tensors: dict[str, Tensor], message: str, state: dict[str, Tensor]) -> None:
    with pytest.raises(CheckpointError) as caught:
        merged_tensors(state, parse(tensors, state))
    assert str(caught.value).startswith(message)


def test_unreadable_settings_of_peft_are_named(state: dict[str, Tensor]) -> None:
    with pytest.raises(CheckpointError, match="lora_adapter_metadata must be JSON"):
        parse(lora_tensors({PROJ: pair(PROJ, state)}, architecture=ROW), state, lora_adapter_metadata="{")


def test_bias_for_a_layer_without_one_is_refused() -> None:
    state = XUDiT(XUT_PRESETS["tiny"], device="meta").state_dict()
    tensors = {"backbone.enc_blocks.0.0.attn.qkv.diff_b": torch.zeros(192)}
    with pytest.raises(CheckpointError, match=r"must not change a bias, for the model's .* has none"):
        parse_lora(tensors, {}, state, find_architecture("xut"), source="file")


def test_control_lora_widens_the_input_of_new_models_alone(state: dict[str, Tensor]) -> None:
    tensors = {
        "img_in.lora_A.weight": draw(2, 8),
        "img_in.lora_B.weight": draw(16, 2),
        "img_in.lora_B.bias": draw(16),
        "single_blocks.0.norm.key_norm.scale": draw(16),
    }
    lora = parse(tensors, state)
    merged = merged_tensors(state, lora)
    padded = torch.cat((state["img_in.weight"], torch.zeros(16, 4)), dim=1)
    assert_close(merged["img_in.weight"], padded + draw(16, 2) @ draw(2, 8), limit=LIMIT)
    with pytest.raises(CheckpointError, match=r"img_in\.weight must keep its shape \(16, 4\) in a model"):
        merge(Flux(CONFIG), lora)


@pytest.mark.parametrize(
    "prefix",
    [
        "diffusion_model.",
        "transformer.",
        "model.",
        "base_model.model.model.",
        "",
        "lora_unet_",
        "lycoris_model_",
    ],
)
def test_forms_of_xut(prefix: str, tmp_path: Path) -> None:
    model = XUDiT(XUT_PRESETS["tiny"])
    layer = "backbone.enc_blocks.0.0.attn.qkv"
    name = prefix + (layer.replace(".", "_") if prefix.endswith("_") else layer)
    save_file(
        {f"{name}.lora_A.weight": draw(2, 64), f"{name}.lora_B.weight": draw(192, 2)},
        tmp_path / "a.safetensors",
    )
    lora = load_lora(tmp_path / "a.safetensors", model.state_dict(), find_architecture("xut"))
    assert [change.parameter for change in lora.changes] == [f"{layer}.weight"]
    assert set(merge(model, lora)) == {f"{layer}.weight"}
