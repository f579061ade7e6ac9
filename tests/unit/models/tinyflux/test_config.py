"""Configurations of TinyFlux: checks, files of every version, and what shapes tell."""

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from flowcore.errors import CheckpointError, ConfigError
from flowcore.models.tinyflux import PRESETS, TinyFlux, TinyFluxConfig, infer_config
from flowcore.models.tinyflux.config import config_differences, published_config
from tests.unit.models.tinyflux.small import BARE, CONFIG

# What the shapes do not tell has the default here.
VARIANTS = {
    "full": replace(CONFIG, lune_dropout=0.1),
    "first": replace(CONFIG, lune_dropout=0.1, sol_qk_scale=False),
    "guidance": replace(CONFIG, lune_dropout=0.1, guidance_embeds=True, mlp_ratio=3.0),
    "deep": PRESETS["tinyflux-deep"],
}
V41 = {
    "hidden_size": 32,
    "use_lune_expert": True,
    "lune_expert_dim": 20,
    "use_sol_prior": True,
    "use_expert_predictor": True,
    "expert_dim": 1280,
    "expert_dropout": 0.3,
    "t5_pool_mode": "attention",
    "_metadata": {"step": 1},
}


def tensors_of(config: TinyFluxConfig) -> dict[str, Tensor]:
    return TinyFlux(config, device="meta").state_dict()


def stated(values: dict[str, Any]) -> dict[str, str]:
    return {"flowcore.config": json.dumps(values)}


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_shapes_tell_the_configuration(config: TinyFluxConfig) -> None:
    assert infer_config(tensors_of(config)) == config


@pytest.mark.parametrize("config", [*VARIANTS.values(), BARE, *PRESETS.values()])
def test_metadata_tells_the_rest(config: TinyFluxConfig) -> None:
    assert infer_config(tensors_of(config), stated(config.to_dict())) == config


def test_ratio_is_the_stated_one_if_it_gives_the_width() -> None:
    config = replace(CONFIG, mlp_ratio=3.3)
    tensors = tensors_of(config)
    assert infer_config(tensors, stated({"mlp_ratio": 3.3})).mlp_ratio == 3.3
    assert infer_config(tensors, stated({"mlp_ratio": 4.0})).mlp_dim == config.mlp_dim


def test_a_token_that_does_not_divide_is_named() -> None:
    for wrong in (3, 0, "2"):
        with pytest.raises(CheckpointError, match=rf"got 4 with patch_size {wrong!r}"):
            infer_config(tensors_of(CONFIG), stated({"patch_size": wrong}))


def test_shapes_win_over_metadata() -> None:
    wrong = {**CONFIG.to_dict(), "hidden_size": 64, "use_sol_prior": False, "lune_hidden_dim": 99}
    assert infer_config(tensors_of(CONFIG), stated(wrong)) == CONFIG


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 48}, "hidden_size must be num_attention_heads * attention_head_dim = 32, got 48"),
        ({"axes_dims_rope": (4, 6, 8)}, "axes_dims_rope must add up to attention_head_dim = 16"),
        ({"axes_dims_rope": (5, 5, 6)}, "axes_dims_rope must be three even sizes, got [5, 5, 6]"),
        ({"axes_dims_rope": (8, 8)}, "axes_dims_rope must be three even sizes, got [8, 8]"),
        ({"num_double_layers": 0}, "num_double_layers must be at least 1, got 0"),
        ({"patch_size": 0}, "patch_size must be at least 1, got 0"),
        ({"lune_dropout": 1.0}, "lune_dropout must be in [0, 1), got 1.0"),
        ({"sol_geometric_weight": 1.5}, "sol_geometric_weight must be in [0, 1], got 1.5"),
        ({"pooled_from_text": True}, "pooled_projection_dim must be joint_attention_dim = 12"),
    ],
)
def test_wrong_values_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        replace(CONFIG, **changes)
    assert message in str(caught.value)


def test_unknown_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"num_single_layer must be a field .*num_single_layers"):
        TinyFluxConfig.from_dict({"num_single_layer": 3})


def test_config_of_4_1_is_read_without_its_old_fields() -> None:
    assert published_config(V41) == {
        "hidden_size": 32,
        "use_lune_expert": True,
        "lune_expert_dim": 20,
        "use_sol_prior": True,
    }


def test_4_1_turns_lune_back_on_with_the_sizes_of_the_old_predictor() -> None:
    found = published_config({**V41, "use_lune_expert": False, "expert_hidden_dim": 64})
    assert (found["use_lune_expert"], found["lune_expert_dim"]) == (True, 1280)
    assert (found["lune_hidden_dim"], found["lune_dropout"]) == (64, 0.3)
    off = published_config({**V41, "use_lune_expert": False, "use_expert_predictor": False})
    assert off["use_lune_expert"] is False


@pytest.mark.parametrize("has_expert", [True, False])
def test_config_of_3_knows_neither_sol_nor_t5_vector(has_expert: bool) -> None:
    found = published_config({"use_expert_predictor": has_expert, "expert_dim": 40})
    assert (found["use_lune_expert"], found["use_sol_prior"], found["use_t5_vec"]) == (
        has_expert,
        False,
        False,
    )


def test_differences_between_file_and_config() -> None:
    assert config_differences(CONFIG, CONFIG.to_dict()) == []
    assert config_differences(BARE, {**CONFIG.to_dict(), **BARE.to_dict(), "lune_expert_dim": 7}) == []
    assert config_differences(CONFIG, {**CONFIG.to_dict(), "num_single_layers": 9}) == [
        "num_single_layers is 2, stated 9"
    ]


def test_position_axes_of_files_without_frequencies() -> None:
    tensors = {name: t for name, t in tensors_of(CONFIG).items() if not name.startswith("rope.")}
    assert infer_config(tensors, stated(CONFIG.to_dict())) == CONFIG
    with pytest.raises(CheckpointError, match="the metadata must state axes_dims_rope"):
        infer_config(tensors)
    deep = {n: t for n, t in tensors_of(PRESETS["tinyflux-deep"]).items() if not n.startswith("rope.")}
    assert infer_config(deep) == PRESETS["tinyflux-deep"]


def test_version_1_is_recognised_and_refused() -> None:
    with pytest.raises(CheckpointError, match="must be those of TinyFlux 2 or later, got TinyFlux 1"):
        infer_config(
            {
                "img_in.weight": torch.empty(256, 16, device="meta"),
                "guidance_in.mlp.0.weight": torch.empty(256, 256, device="meta"),
            }
        )


def test_damaged_tensors_are_named() -> None:
    tensors = tensors_of(CONFIG)
    del tensors["txt_in.weight"]
    with pytest.raises(CheckpointError, match=r"a tinyflux checkpoint must hold txt_in\.weight"):
        infer_config(tensors)
    tensors = tensors_of(CONFIG)
    tensors["sol_prior.spatial_predictor.4.weight"] = torch.empty(15, 8, device="meta")
    with pytest.raises(CheckpointError, match="must have a square of rows, got 15"):
        infer_config(tensors)
