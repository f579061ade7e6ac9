"""The layouts of diffusers and of scaled 8-bit files, and detection of all of them."""

import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel
from safetensors.torch import save_file
from torch import Tensor

from flowcore.errors import CheckpointError, ConfigError
from flowcore.inspection import convert_file, describe_file
from flowcore.models import detect, find_architecture, find_layout
from flowcore.models.flux import PRESETS, Flux, FluxConfig
from flowcore.models.flux.layouts import (
    FUSED,
    LAYERS,
    SCALES,
    SWAPPED,
    diffusers_config,
    from_diffusers,
    to_diffusers,
)
from flowcore.weights.checkpoint import build_model, load_model, read_tensors, save_model
from tests.support import FORWARD_LIMIT, assert_close

ROW = find_architecture("flux")
CONFIG = FluxConfig(
    in_channels=8,
    out_channels=4,
    vec_in_dim=6,
    context_in_dim=7,
    hidden_size=32,
    num_heads=2,
    depth=2,
    depth_single_blocks=2,
    axes_dim=(4, 6, 6),
    guidance_embed=True,
)


def random_state(config: FluxConfig = CONFIG) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = Flux(config, device="meta").state_dict()
    return {name: torch.randn(t.shape, generator=generator) * 0.2 for name, t in shapes.items()}


def inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "img": torch.randn(2, 6, 8, generator=generator),
        "img_ids": torch.randint(0, 9, (1, 6, 3), generator=generator),
        "txt": torch.randn(2, 3, 7, generator=generator),
        "txt_ids": torch.zeros(1, 3, 3, dtype=torch.long),
        "timesteps": torch.rand(2, generator=generator),
        "y": torch.randn(2, 6, generator=generator),
        "guidance": torch.tensor([3.5, 30.0]),
    }


def metadata(config: FluxConfig = CONFIG) -> dict[str, str]:
    return {"flowcore.config": json.dumps(config.to_dict())}


def same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return set(actual) == set(expected) and all(
        torch.equal(actual[name], expected[name]) for name in expected
    )


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"guidance_embed": False},
        {"depth": 0},
        {"depth_single_blocks": 0},
        {"depth": 1, "depth_single_blocks": 12},
    ],
)
def test_diffusers_round_trip(changes: dict[str, object]) -> None:
    config = replace(CONFIG, **changes)
    state = random_state(config)
    foreign = to_diffusers(state, config)
    assert not set(foreign) & set(state)
    assert same(from_diffusers(foreign), state)
    assert same(to_diffusers(from_diffusers(foreign), config), foreign)


def test_tables_name_every_layer_once() -> None:
    own = [*LAYERS, *FUSED, *SWAPPED, *SCALES]
    foreign = [
        *LAYERS.values(),
        *(name for names in FUSED.values() for name in names),
        *SWAPPED.values(),
        *SCALES.values(),
    ]
    assert len(set(own)) == len(own)
    assert len(set(foreign)) == len(foreign)


@torch.no_grad()
def test_class_of_diffusers_takes_what_is_written() -> None:
    state = random_state()
    settings = {name: value for name, value in diffusers_config(CONFIG).items() if not name.startswith("_")}
    theirs = FluxTransformer2DModel(**settings)
    theirs.load_state_dict(to_diffusers(state, CONFIG), strict=True)
    given = inputs()
    expected = theirs(
        hidden_states=given["img"],
        encoder_hidden_states=given["txt"],
        pooled_projections=given["y"],
        timestep=given["timesteps"],
        img_ids=given["img_ids"][0],
        txt_ids=given["txt_ids"][0],
        guidance=given["guidance"],
        return_dict=False,
    )[0]
    ours = build_model(state, metadata(), source="x").model
    assert_close(ours(**given), expected, limit=FORWARD_LIMIT)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"mlp_ratio": 2.0},
            "mlp_dim must be 128 for the layout of diffusers, got 64; keep the original names",
        ),
        ({"theta": 100}, "theta must be 10000 for the layout of diffusers, got 100"),
        ({"qkv_bias": False}, "qkv_bias must be True for the layout of diffusers, got False"),
    ],
)
def test_what_diffusers_cannot_hold_is_refused(changes: dict[str, object], message: str) -> None:
    config = replace(CONFIG, **changes)
    with pytest.raises(ConfigError) as caught:
        to_diffusers(random_state(config), config)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("prefix", [p for p in ROW.prefixes if p])
@pytest.mark.parametrize("foreign", [False, True])
def test_prefixes_are_found_in_both_layouts(prefix: str, foreign: bool) -> None:
    state = to_diffusers(random_state(), CONFIG) if foreign else random_state()
    others = {"vae.encoder.conv_in.weight": torch.zeros(1), "text_encoders.clip_l.x": torch.zeros(1)}
    tensors = {**{prefix + name: tensor for name, tensor in state.items()}, **others}
    architecture, found = detect(tensors)
    assert (architecture.name, found) == ("flux", prefix)
    assert same(build_model(tensors, metadata(), source="x").model.state_dict(), random_state())


def test_part_of_a_fused_layer_alone_is_reported() -> None:
    foreign = to_diffusers(random_state(), CONFIG)
    del foreign["transformer_blocks.1.attn.to_k.weight"]
    with pytest.raises(CheckpointError) as caught:
        build_model(foreign, metadata(), source="file")
    message = str(caught.value)
    assert "1 missing (double_blocks.1.img_attn.qkv.weight)" in message
    assert (
        "2 unexpected (transformer_blocks.1.attn.to_q.weight, transformer_blocks.1.attn.to_v.weight)"
        in message
    )


def test_strange_tensor_is_reported_under_its_own_name() -> None:
    foreign = to_diffusers(random_state(), CONFIG) | {"transformer_blocks.0.adapter.weight": torch.zeros(2)}
    with pytest.raises(CheckpointError, match=r"1 unexpected \(transformer_blocks\.0\.adapter\.weight\)"):
        build_model(foreign, metadata(), source="file")


@pytest.mark.parametrize("foreign", [False, True])
def test_scaled_weights_are_multiplied_out(foreign: bool) -> None:
    state = random_state()
    source = to_diffusers(state, CONFIG) if foreign else state
    stored: dict[str, Tensor] = {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}
    for name, tensor in source.items():
        if tensor.ndim == 2:
            scale = tensor.abs().max() / 448
            stored[name] = (tensor / scale).to(torch.float8_e4m3fn)
            stored[f"{name.removesuffix('.weight')}.scale_weight"] = scale
            stored[f"{name.removesuffix('.weight')}.scale_input"] = torch.tensor(1.0)
        else:
            stored[name] = tensor.bfloat16()
    prefixed = {f"model.diffusion_model.{name}": tensor for name, tensor in stored.items()}
    model = build_model(prefixed, metadata(), source="x", dtype=torch.float32).model
    for name, tensor in model.state_dict().items():
        assert_close(tensor, state[name], limit=0.2)
    layout = find_layout(ROW, stored)
    assert layout is not None
    assert layout.name == "scaled_fp8"


def test_plain_8_bit_weights_are_read_in_the_asked_dtype() -> None:
    state = {name: tensor.to(torch.float8_e5m2) for name, tensor in random_state().items()}
    model = build_model(state, metadata(), source="x", dtype=torch.bfloat16).model
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.bfloat16, torch.float32}


def test_files_are_converted_there_and_back(tmp_path: Path) -> None:
    save_model(tmp_path / "own.safetensors", random_state(), architecture="flux", config=CONFIG)
    chain = ["own", "diffusers", "model.diffusion_model", "bare"]
    for source, layout in itertools.pairwise(chain):
        line = convert_file(tmp_path / f"{source}.safetensors", tmp_path / f"{layout}.safetensors", layout)
        assert line.endswith(f"layout {layout}")
        described = describe_file(tmp_path / f"{layout}.safetensors")
        assert (described["architecture"], described["layout"]) == ("flux", layout)
        assert described["config"] == CONFIG.to_dict()
    assert same(read_tensors(tmp_path / "bare.safetensors")[0], random_state())
    assert "x_embedder.weight" in read_tensors(tmp_path / "diffusers.safetensors")[0]
    with pytest.raises(ConfigError, match=r"the layout must be one of .*bare, diffusers, got 'jax'"):
        convert_file(tmp_path / "own.safetensors", tmp_path / "x.safetensors", "jax")


def test_folder_of_diffusers_needs_no_other_metadata(tmp_path: Path) -> None:
    state = to_diffusers(random_state(), CONFIG)
    save_file({n: t.clone() for n, t in state.items()}, tmp_path / "diffusion_pytorch_model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(diffusers_config(CONFIG)))
    loaded = load_model(tmp_path)
    assert loaded.config == CONFIG
    assert same(loaded.model.state_dict(), random_state())


@pytest.mark.parametrize("preset", ["flux-dev", "flux-schnell"])
def test_published_sizes_are_found_in_both_layouts(preset: str) -> None:
    config = PRESETS[preset]
    state = Flux(config, device="meta").state_dict()
    for tensors in (state, to_diffusers(state, config)):
        architecture, prefix = detect(tensors)
        assert (architecture.name, prefix) == ("flux", "")


@pytest.mark.parametrize(
    "keys",
    [
        ["img_in.weight", "txt_in.weight", "time_in.mlp.0.weight", "double_blocks.0.attn.img_qkv.weight"],
        ["x_embedder.weight", "t_embedder.0.weight", "blocks.0.attention_norm_q.weight"],
        ["img_in.lora_A.weight", "single_blocks.0.norm.key_norm.scale"],
    ],
)
def test_others_are_not_taken_for_flux(keys: list[str]) -> None:
    assert not ROW.is_match(keys)
    assert find_layout(ROW, keys) is None
