"""Fields, their checks, and reading them back from tensors."""

import json
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from flowcore.errors import CheckpointError, ConfigError
from flowcore.models.single_stream import PRESETS, SingleStreamConfig, SingleStreamDiT, infer_config

BASE = PRESETS["tiny"]
HEAD = replace(BASE, variant="head")
DEFAULTS = {"rope_base": 10_000, "dropout": 0.05, "fourier_gate": 1e-4}


def meta_tensors(config: SingleStreamConfig) -> dict[str, Tensor]:
    return SingleStreamDiT(config, device="meta").state_dict()


@pytest.mark.parametrize(
    "config",
    [
        BASE,
        replace(BASE, refiner_depth=0, depth=1),
        replace(BASE, refiner_depth=2, depth=3, max_token_length=9, text_embed_dim=7),
        replace(BASE, patch_size=4),
        replace(BASE, hidden_size=48, num_heads=3),
        HEAD,
        replace(HEAD, fourier_stack_depth=3),
        replace(HEAD, use_fourier_in_refiner=False),
        replace(HEAD, use_fourier_in_refiner=False, fourier_stack_depth=1),
    ],
)
def test_inferred_from_shapes(config: SingleStreamConfig) -> None:
    assert infer_config(meta_tensors(config)) == replace(config, **DEFAULTS)


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_inferred_with_their_metadata(preset: str) -> None:
    config = PRESETS[preset]
    metadata = {"flowcore.config": json.dumps(config.to_dict())}
    assert infer_config(meta_tensors(config), metadata) == config


def test_metadata_gives_only_what_shapes_do_not() -> None:
    lying = replace(
        HEAD, depth=5, num_heads=1, max_token_length=5, rope_base=100, dropout=0.5, fourier_gate=2
    )
    stored = {"flowcore.config": json.dumps(lying.to_dict())}
    assert infer_config(meta_tensors(BASE), stored) == replace(
        BASE, rope_base=100, dropout=0.5, fourier_gate=2
    )


@pytest.mark.parametrize(
    ("stored", "split"),
    [
        ({}, (16, 1)),
        ({"in_channels": 4}, (4, 2)),
        ({"patch_size": 2}, (4, 2)),
        ({"in_channels": 1, "patch_size": 4}, (1, 4)),
    ],
)
def test_a_token_of_16_numbers_is_split_by_metadata(stored: dict[str, int], split: tuple[int, int]) -> None:
    tensors = meta_tensors(replace(BASE, in_channels=16, patch_size=1))
    config = infer_config(tensors, {"flowcore.config": json.dumps(stored)})
    assert (config.in_channels, config.patch_size) == split


@pytest.mark.parametrize("stored", [{"in_channels": 3}, {"patch_size": 0}, {"in_channels": "x"}])
def test_a_token_that_does_not_divide_is_refused(stored: dict[str, object]) -> None:
    with pytest.raises(CheckpointError, match=r"x_embedder\.weight must take in_channels \* patch_size\^2"):
        infer_config(meta_tensors(BASE), {"flowcore.config": json.dumps(stored)})


@pytest.mark.parametrize("text", ["{", "[1]"])
def test_unreadable_metadata(text: str) -> None:
    with pytest.raises(CheckpointError, match=r"flowcore\.config must be"):
        infer_config(meta_tensors(BASE), {"flowcore.config": text})


def test_missing_tensor_is_named() -> None:
    tensors = meta_tensors(BASE)
    tensors["x_embedder.weight"] = torch.empty(3, device="meta")
    with pytest.raises(CheckpointError, match="must have 2 axes"):
        infer_config(tensors)
    del tensors["x_embedder.weight"]
    with pytest.raises(CheckpointError, match=r"a single_stream checkpoint must hold x_embedder\.weight"):
        infer_config(tensors)


@pytest.mark.parametrize("preset", PRESETS)
def test_dictionary_round_trip(preset: str) -> None:
    config = PRESETS[preset]
    assert SingleStreamConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(("width", "inner"), [(32, 256), (128, 512), (384, 1024), (768, 2048)])
def test_width_of_the_feed_forward(width: int, inner: int) -> None:
    assert replace(BASE, hidden_size=width).mlp_dim == inner


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"dept": 3}, "dept must be a field of SingleStreamConfig, got an unknown name; nearest is depth"),
        ({"variant": "v2"}, "variant must be one of v3, head, got 'v2'"),
        ({"depth": 0}, "depth must be at least 1, got 0"),
        ({"depth": "3"}, "depth must be a number, got '3'"),
        ({"refiner_depth": -1}, "refiner_depth must be at least 0, got -1"),
        ({"num_heads": 5}, "hidden_size must be num_heads times a multiple of 4, got 384 with 5 heads"),
        ({"num_heads": 64}, "hidden_size must be num_heads times a multiple of 4, got 384 with 64 heads"),
        ({"dropout": 1.0}, "dropout must be in [0, 1), got 1.0"),
        ({"rope_base": 0}, "rope_base must be positive, got 0"),
        (
            {"fourier_stack_depth": 1},
            "use_fourier_in_refiner must be true and fourier_stack_depth 0 in variant v3",
        ),
    ],
)
def test_unusable_fields_are_named(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        SingleStreamConfig.from_dict(values)
    assert str(caught.value).startswith(message)
