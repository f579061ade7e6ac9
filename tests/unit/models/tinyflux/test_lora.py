"""TinyFlux's own LoRA files: configurations, presets, keys."""

import json
from typing import Any

import pytest
import torch
from torch import Tensor

from flowcore.errors import CheckpointError, ConfigError
from flowcore.models import find_architecture
from flowcore.models.tinyflux import PRESETS
from flowcore.models.tinyflux.lora import (
    LORA_PRESETS,
    LoraConfig,
    LoraSpec,
    LoraTarget,
    learning_rates,
    native_shapes,
    native_to_standard,
    standard_to_native,
)
from flowcore.weights.lora import merged_tensors, parse_lora
from tests.support import FORWARD_LIMIT, assert_close
from tests.unit.models.tinyflux.small import random_model

LAYER = "double_blocks.0.attn.img_qkv"


def numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape) + shape[0]))


@pytest.mark.parametrize(
    ("preset", "layers", "parameters"),
    [
        ("minimal", 50, 614_400),
        ("standard", 100, 3_276_800),
        ("character", 100, 3_276_800),
        ("concept", 60, 2_949_120),
        ("full", 160, 4_751_360),
        ("progressive", 160, 5_533_696),
    ],
)
def test_sizes_of_presets(preset: str, layers: int, parameters: int) -> None:
    config = LORA_PRESETS[preset]
    assert len(config.resolve(15, 25)) == layers
    shapes = native_shapes(config, PRESETS["tinyflux-deep"])
    assert sum(height * width for height, width in shapes.values()) == parameters
    assert config.unmatched(15, 25) == []
    assert LoraConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_ranks_and_rates_of_presets() -> None:
    character = LORA_PRESETS["character"].resolve(15, 25)
    assert [character[f"single_blocks.{i}.mlp.fc1"].rank for i in (0, 9, 10, 19, 20, 24)] == [
        8,
        8,
        16,
        16,
        32,
        32,
    ]
    assert {spec.alpha for spec in character.values()} == {16.0}
    rates = learning_rates(character, 1e-4)
    assert {round(rate, 9): len(paths) for rate, paths in rates.items()} == {5e-5: 40, 1e-4: 40, 1.5e-4: 20}
    progressive = LORA_PRESETS["progressive"].resolve(15, 25)
    assert [progressive[f"double_blocks.{i}.attn.txt_out"].rank for i in (0, 7, 14)] == [8, 16, 24]
    assert [progressive[f"single_blocks.{i}.attn.qkv"].rank for i in (0, 12, 24)] == [8, 20, 32]


@pytest.mark.parametrize(
    ("pattern", "path", "is_match"),
    [
        ("single_blocks.*.attn.qkv", "single_blocks.3.attn.qkv", True),
        ("single_blocks.*.attn.qkv", "single_blocks.3.attn.qkv.x", False),
        ("single_blocks.[20-24].*.*", "single_blocks.22.mlp.fc1", True),
        ("single_blocks.[20-24].*.*", "single_blocks.2.mlp.fc1", False),
        ("single_blocks.[20-24].*", "single_blocks.22.mlp.fc1", False),  # whole paths alone
        ("*.mlp.*", "single_blocks.22.mlp.fc1", False),
        ("**.mlp.*", "single_blocks.22.mlp.fc1", True),
        ("single_blocks.[0,5,10].attn.*", "single_blocks.5.attn.out_proj", True),
        ("single_blocks.[0,5,10].attn.*", "single_blocks.6.attn.out_proj", False),
        ("single_blocks.1.attn.qkv", "single_blocksx1.attn.qkv", False),
    ],
)
def test_patterns(pattern: str, path: str, is_match: bool) -> None:
    assert LoraTarget(pattern=pattern).is_match(path) is is_match


def test_priorities() -> None:
    config = LoraConfig.from_dict(
        {
            "defaults": {"rank": 4, "alpha": 2.0},
            "targets": [
                {"pattern": "single_blocks.*.attn.qkv", "rank": 8, "_comment": "first"},
                {"pattern": "single_blocks.1.attn.*", "rank": 2, "dropout": 0.1},
                {"pattern": "single_blocks.*.mlp.fc2", "enabled": False},
                {"pattern": "double_blocks.0.attn.txt_qkv", "enabled": True},
                {"pattern": "*.mlp.*", "rank": 1},
            ],
            "layer_specs": {"double_blocks.0.attn.img_out": {"rank": 6}},
            "extensions": {"single_blocks": 2},
        }
    )
    specs = config.resolve(1, 2)
    assert specs["single_blocks.0.attn.qkv"] == LoraSpec(rank=8, alpha=2.0)
    assert specs["single_blocks.1.attn.qkv"] == LoraSpec(rank=2, alpha=2.0, dropout=0.1)
    assert specs["double_blocks.0.attn.txt_qkv"].rank == 4
    assert specs["double_blocks.0.attn.img_out"] == LoraSpec(rank=6)
    assert {path.split(".", 2)[2] for path in specs if "mlp" in path} == {"mlp.fc1"}
    assert {path for path in specs if "double" in path} == {
        "double_blocks.0.attn.txt_qkv",
        "double_blocks.0.attn.img_out",
    }
    assert config.unmatched(1, 2) == ["*.mlp.*"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"defaults": {"ranks": 4}}, "ranks must be a field of LoraSpec"),
        ({"include_mlp": True}, "include_mlp must be a field of LoraConfig"),
        ({"defaults": {"rank": 0}}, "rank of a LoRA layer must be at least 1, got 0"),
        ({"defaults": {"dropout": 1}}, "dropout of a LoRA layer must be in [0, 1), got 1"),
    ],
)
def test_wrong_configurations_are_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        LoraConfig.from_dict(values)
    assert message in str(caught.value)


def merged(tensors: dict[str, Tensor], metadata: dict[str, str]) -> Tensor:
    """What a file adds to the one layer."""
    state = random_model().state_dict()
    lora = parse_lora(tensors, metadata, state, find_architecture("tinyflux"), source="file")
    assert lora.unused == ()
    return merged_tensors(state, lora)[f"{LAYER}.weight"] - state[f"{LAYER}.weight"]


def test_native_file_has_the_factor_of_its_configuration() -> None:
    down, up = numbers(4, 32), numbers(96, 4)
    config = {"defaults": {"rank": 4, "alpha": 6.0}, "include_double_attn": True}
    name = LAYER.replace(".", "_")
    tensors = {f"{name}.lora_A": down, f"{name}.lora_B": up}
    assert_close(merged(tensors, {"config_json": json.dumps(config)}), 1.5 * up @ down, limit=FORWARD_LIMIT)


def test_stacked_pairs_add_up() -> None:
    pairs = [(numbers(4, 32), numbers(96, 4)), (numbers(4, 32) * 2, numbers(96, 4) - 1)]
    name = LAYER.replace(".", "_")
    tensors = {f"{name}.lora_A.{i}": down for i, (down, _) in enumerate(pairs)}
    tensors |= {f"{name}.lora_B.{i}": up for i, (_, up) in enumerate(pairs)}
    config = {"defaults": {"rank": 4, "alpha": 8.0, "depth": 2}, "include_double_attn": True}
    expected = 2 * sum(up @ down for down, up in pairs)
    assert_close(merged(tensors, {"config_json": json.dumps(config)}), expected, limit=FORWARD_LIMIT)


def test_prototype_file() -> None:
    down, up = numbers(4, 32), numbers(96, 4)
    tensors = {"block_0_img_qkv.lora_A": down, "block_0_img_qkv.lora_B": up}
    metadata = {"type": "double_stream_lora", "rank": "4", "alpha": "2.0", "num_adapters": "1"}
    assert_close(merged(tensors, metadata), 0.5 * up @ down, limit=FORWARD_LIMIT)


def test_own_form_to_native_and_back() -> None:
    own = {
        f"diffusion_model.{LAYER}.lora_A.weight": numbers(4, 32),
        f"diffusion_model.{LAYER}.lora_B.weight": numbers(96, 4),
        f"diffusion_model.{LAYER}.alpha": torch.tensor(2.0),
    }
    tensors, metadata = standard_to_native(own)
    assert set(tensors) == {f"{LAYER.replace('.', '_')}.lora_{side}" for side in "AB"}
    again = native_to_standard(tensors, metadata)
    assert again.keys() == own.keys()
    assert all(torch.equal(again[name], own[name]) for name in own)
    with pytest.raises(CheckpointError, match="must change attention and single MLPs alone"):
        standard_to_native({"diffusion_model.img_in.lora_A.weight": numbers(4, 4)})


def test_other_forms_are_left_as_they_are() -> None:
    own = {"diffusion_model.x.lora_A.weight": numbers(4, 4), "ext_single_0.mlp.fc1.weight": numbers(2, 2)}
    assert native_to_standard(own, {}) == own


def test_incomplete_native_files_are_refused() -> None:
    name = LAYER.replace(".", "_")
    pair = {f"{name}.lora_A": numbers(4, 32), f"{name}.lora_B": numbers(96, 4)}
    with pytest.raises(CheckpointError, match="must state alpha in its metadata"):
        native_to_standard(pair, {})
    with pytest.raises(CheckpointError, match="config_json of a TinyFlux LoRA must be JSON"):
        native_to_standard(pair, {"config_json": "{"})
    with pytest.raises(CheckpointError, match="must cover its layers, got none for double_blocks"):
        native_to_standard(pair, {"config_json": "{}"})
    with pytest.raises(CheckpointError, match="must have as many lora_A as lora_B"):
        native_to_standard({f"{name}.lora_A": numbers(4, 32)}, {"config_json": "{}"})
