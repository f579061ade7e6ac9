"""Fields, their checks, and reading them back from tensors."""

import json
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from flowcore.errors import CheckpointError, ConfigError
from flowcore.models.flux import PRESETS, Flux, FluxConfig, infer_config

POINTS = PRESETS["points"]


def meta_tensors(config: FluxConfig) -> dict[str, Tensor]:
    return Flux(config, device="meta").state_dict()


def stated(**fields: object) -> dict[str, str]:
    return {"flowcore.config": json.dumps(fields)}


@pytest.mark.parametrize(
    ("preset", "parameters", "tensors"),
    [
        ("points", 261_602, 80),
        ("demo", 2_325_056, 96),
        ("readme", 142_997_506, 96),
        ("flux-dev", 11_901_408_320, 780),
        ("flux-schnell", 11_891_178_560, 776),
        ("flux-dev-canny", 11_901_604_928, 780),
        ("flux-dev-fill", 11_902_391_360, 780),
    ],
)
def test_sizes_of_presets(preset: str, parameters: int, tensors: int) -> None:
    model = Flux(PRESETS[preset], device="meta")
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert len(model.state_dict()) == tensors


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"depth": 0},
        {"depth_single_blocks": 0},
        {"qkv_bias": False, "guidance_embed": True},
        {"in_channels": 3, "out_channels": 5, "vec_in_dim": 6, "context_in_dim": 7},
        {"mlp_ratio": 2.0},
        {"mlp_ratio": 3.3},  # int(48 * 3.3) = 158
    ],
)
def test_inferred_from_shapes(changes: dict[str, object]) -> None:
    config = replace(POINTS, **changes)
    inferred = infer_config(meta_tensors(config), stated(axes_dim=[8, 8], theta=100))
    assert inferred.mlp_dim == config.mlp_dim
    assert replace(inferred, mlp_ratio=config.mlp_ratio) == config


def test_every_width_of_the_feed_forward_is_found() -> None:
    for width in range(1, 400):
        config = replace(POINTS, depth=1, depth_single_blocks=0, mlp_ratio=(width + 0.5) / 48)
        assert infer_config(meta_tensors(config), stated(axes_dim=[8, 8])).mlp_dim == config.mlp_dim == width


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_inferred_with_their_metadata(preset: str) -> None:
    config = PRESETS[preset]
    assert infer_config(meta_tensors(config), stated(**config.to_dict())) == config
    assert FluxConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("preset", ["readme", "flux-dev", "flux-schnell", "flux-dev-fill"])
def test_heads_of_128_need_no_metadata(preset: str) -> None:
    assert infer_config(meta_tensors(PRESETS[preset])) == PRESETS[preset]


def test_config_of_diffusers_tells_the_axes() -> None:
    fields = {"_class_name": "FluxTransformer2DModel", "patch_size": 1, "axes_dims_rope": [2, 6, 8]}
    inferred = infer_config(meta_tensors(POINTS), stated(**fields))
    assert inferred == replace(POINTS, axes_dim=(2, 6, 8), theta=10_000)


def test_ratio_is_the_stated_one_if_it_gives_the_width() -> None:
    tensors = meta_tensors(replace(POINTS, mlp_ratio=3.3))  # 158 wide
    assert infer_config(tensors, stated(axes_dim=[8, 8], mlp_ratio=3.3)).mlp_ratio == 3.3
    for other in (4.0, "wide", float("nan")):
        assert infer_config(tensors, stated(axes_dim=[8, 8], mlp_ratio=other)).mlp_dim == 158


def test_unknown_axes_are_asked_for() -> None:
    with pytest.raises(CheckpointError, match="must state axes_dim for heads of 16 channels, got none"):
        infer_config(meta_tensors(POINTS))


def test_metadata_gives_only_what_shapes_do_not() -> None:
    lying = replace(PRESETS["demo"], axes_dim=(8, 8), hidden_size=16, num_heads=1, theta=7).to_dict()
    assert infer_config(meta_tensors(POINTS), stated(**lying)) == replace(
        POINTS, theta=7, pooled_from_text=True
    )


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("img_in.weight", None, "a flux checkpoint must hold img_in.weight, got 79 tensors without it"),
        ("final_layer.linear.weight", None, "a flux checkpoint must hold final_layer.linear.weight"),
        ("txt_in.weight", (3,), "txt_in.weight must have 2 axes of at least 1, got shape (3,)"),
        ("double_blocks.0.img_attn.norm.query_norm.scale", (7,), "heads of a flux checkpoint must divide"),
    ],
)
def test_unusable_tensors_are_named(name: str, shape: tuple[int, ...] | None, message: str) -> None:
    tensors = meta_tensors(POINTS)
    del tensors[name]
    if shape is not None:
        tensors[name] = torch.empty(shape, device="meta")
    with pytest.raises(CheckpointError) as caught:
        infer_config(tensors, stated(axes_dim=[8, 8]))
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"hiden_size": 3},
            "hiden_size must be a field of FluxConfig, got an unknown name; nearest is hidden_size",
        ),
        ({"num_heads": 5}, "hidden_size must be a multiple of num_heads = 5, got 48"),
        (
            {"axes_dim": [8, 6]},
            "axes_dim must add up to the head width hidden_size / num_heads = 16, got [8, 6]",
        ),
        ({"axes_dim": [5, 11]}, "every entry of axes_dim must be even, got [5, 11]"),
        ({"axes_dim": "8, 8"}, "axes_dim must be a whole number (axes_dim a list of them), got '8, 8'"),
        ({"axes_dim": 16}, "axes_dim must be a whole number (axes_dim a list of them), got 16"),
        ({"depth": [2]}, "depth must be a whole number (axes_dim a list of them), got [2]"),
        ({"theta": None}, "theta must be a finite number"),
        ({"mlp_ratio": float("nan")}, "mlp_ratio must be a finite number"),
        ({"hidden_size": 48.0}, "hidden_size must be a whole number (axes_dim a list of them), got 48.0"),
        ({"theta": 0}, "theta must be positive, got 0"),
        ({"depth": -1}, "depth must be at least 0, got -1"),
        ({"depth": 0, "depth_single_blocks": 0}, "depth and depth_single_blocks must not both be 0"),
        ({"in_channels": 0}, "in_channels must be at least 1, got 0"),
        ({"mlp_ratio": 0.01}, "mlp_dim must be at least 1, got 0"),
    ],
)
def test_unusable_fields_are_named(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        FluxConfig.from_dict(POINTS.to_dict() | changes)
    assert str(caught.value).startswith(message)


def test_missing_fields_are_named() -> None:
    with pytest.raises(ConfigError, match=r"must state in_channels, out_channels, .*, got depth"):
        FluxConfig.from_dict({"depth": 1})


def test_flux1_sizes_need_y() -> None:
    assert PRESETS["flux-schnell"].needs_y
    assert PRESETS["flux-dev-fill"].needs_y
    assert not any(PRESETS[preset].needs_y for preset in ("tiny", "points", "demo", "readme"))
