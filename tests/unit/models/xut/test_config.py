"""Fields, their checks, and reading them back from tensors."""

import json
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from flowcore.errors import CheckpointError, ConfigError
from flowcore.models.xut import PRESETS, TreadConfig, XUDiT, XUTConfig, infer_config

BASE = XUTConfig(dim=32, ctx_dim=12, heads=4, dim_head=8, mlp_dim=48, depth=2)
TREAD = TreadConfig(prev_trns_depth=1, post_trns_depth=2, dropout_ratio=0.5)


def meta_tensors(config: XUTConfig) -> dict[str, Tensor]:
    return XUDiT(config, device="meta").state_dict()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"enc_blocks": (0, 2), "dec_blocks": (1, 3)},
        {"enc_blocks": (0, 0)},
        {"concat_ctx": False},
        {"concat_ctx": False, "dec_ctx": True},
        {"ctx_dim": None},
        {"shared_adaln": False, "use_dyt": True},
        {"class_cond": 7, "ctx_dim": None, "double_t": True, "addon_info_embs_dim": 3},
        {"tread_config": TREAD},
        {"tread_config": replace(TREAD, prev_trns_depth=0)},
        {"patch_size": 4, "input_dim": 16},
    ],
)
def test_inferred_from_shapes(changes: dict[str, object]) -> None:
    config = replace(BASE, **changes)
    inferred = infer_config(meta_tensors(config))
    assert inferred.enc_block_counts == config.enc_block_counts
    assert inferred.dec_block_counts == config.dec_block_counts
    same = {"enc_blocks": config.enc_blocks, "dec_blocks": config.dec_blocks}
    assert replace(inferred, **same) == config


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_inferred_with_their_metadata(preset: str) -> None:
    config = PRESETS[preset]
    metadata = {"flowcore.config": json.dumps(config.to_dict())}
    assert infer_config(meta_tensors(config), metadata) == config


def test_metadata_gives_only_what_shapes_do_not() -> None:
    lying = replace(
        BASE, mlp_dim=99, depth=5, ctx_size=7, residual="prenorm", skip_source="self", ln_eps=1e-6
    )
    inferred = infer_config(meta_tensors(BASE), {"flowcore.config": json.dumps(lying.to_dict())})
    assert inferred == replace(BASE, ctx_size=7, residual="prenorm", skip_source="self", ln_eps=1e-6)


@pytest.mark.parametrize("text", ["{", "[1]"])
def test_unreadable_metadata(text: str) -> None:
    with pytest.raises(CheckpointError, match=r"flowcore\.config must be"):
        infer_config(meta_tensors(BASE), {"flowcore.config": text})


def test_missing_tensor_is_named() -> None:
    tensors = meta_tensors(BASE)
    del tensors["in_patch.proj.weight"]
    with pytest.raises(CheckpointError, match=r"must hold in_patch\.proj\.weight"):
        infer_config(tensors)
    tensors["in_patch.proj.weight"] = torch.empty(3, device="meta")
    with pytest.raises(CheckpointError, match="must have 4 axes"):
        infer_config(tensors)


@pytest.mark.parametrize("preset", PRESETS)
def test_dictionary_round_trip(preset: str) -> None:
    config = PRESETS[preset]
    assert XUTConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"dimm": 3}, "dimm must be a field of XUTConfig, got an unknown name; nearest is dim"),
        ({"tread_config": {"ratio": 3}}, "tread_config.ratio must be a field"),
        ({"tread_config": {"dropout_ratio": 0.5}}, "tread_config must have"),
        ({"dim": 100}, "dim must be heads * dim_head = 1024, got 100"),
        ({"depth": 0}, "depth must be at least 1, got 0"),
        ({"dec_blocks": [1, 1]}, "dec_blocks must have one entry for each of depth = 8 stages, got 2"),
        ({"dec_blocks": 0}, "dec_blocks must be at least 1 in every stage, got 0"),
        ({"residual": "post"}, "residual must be one of"),
        ({"skip_source": "mirror"}, "skip_source must be one of"),
        (
            {"tread_config": {"prev_trns_depth": 1, "post_trns_depth": 1, "dropout_ratio": 1.0}},
            "tread_config.dropout_ratio must be in [0, 1), got 1.0",
        ),
        (
            {"tread_config": {"prev_trns_depth": -1, "post_trns_depth": 1, "dropout_ratio": 0.5}},
            "tread_config.prev_trns_depth must be at least 0, got -1",
        ),
    ],
)
def test_unusable_fields_are_named(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        XUTConfig.from_dict(values)
    assert str(caught.value).startswith(message)
