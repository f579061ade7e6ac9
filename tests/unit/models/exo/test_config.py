"""Exo's sizes: the counts of its presets, and what is read back from tensors."""

import json
from dataclasses import replace
from typing import Any

import pytest
import torch

from flowcore.__main__ import main
from flowcore.errors import CheckpointError, ConfigError
from flowcore.models.exo import PRESETS, Exo, ExoConfig, infer_config
from flowcore.models.exo.budget import budget_table, count_parameters
from flowcore.models.exo.trunk import build_trunk
from flowcore.models.exo.trunk_config import TRUNKS, infer_trunk, trunk_config

# text, vision, lora, adapters, tokens, projector, memory, diffusion head, edit head, both, own, total
COUNTS = {
    "tiny": "180928 164224 28672 24964 21568 6336 5184 217680 27073 244753 331477 676629",
    "demo": "2755776 1268064 147456 328964 62080 104880 57600 7327760 362113 7689873 8390853 12414693",
    "small": (
        "10328384 3991520 327680 788228 155392 215696 123264 20980880 1379521 22360401 23970661 38290565"
    ),
    "2b": (
        "1720574976 406957056 6422528 23077892 2409472 8670272 2950656 345595264 23213313 368808577 412339397"
    ),
    "4b": (
        "4022468096 415347712 11796480 34089988 2946048 9014848 3343872 570842752 24000769 594843521 "
        "656034757"
    ),
    "8b": (
        "7568405504 576388336 15335424 83903492 4555776 10048576 6031360 1092226688 44191745 1136418433 "
        "1256293061"
    ),
    "8b-literal": (
        "7568405504 576388336 15335424 167789572 4498432 9725904 5572608 1091767824 44191745 1135959569 "
        "1338881509"
    ),
}


@pytest.mark.parametrize("name", COUNTS)
def test_counts(name: str) -> None:
    expected = [int(count) for count in COUNTS[name].split()]
    found = list(count_parameters(PRESETS[name]).values())
    assert found[: len(expected)] == expected
    assert found[-1] == expected[0] + expected[1] + expected[10]


def test_layers_that_are_tapped() -> None:
    assert PRESETS["8b"].adapter_layers == (8, 17, 26, 35)
    assert PRESETS["2b"].adapter_layers == (6, 13, 20, 27)
    assert PRESETS["8b"].context_layers == (9, 18, 27)
    assert PRESETS["2b"].context_layers == (7, 14, 21)
    assert PRESETS["tiny"].context_layers == (1, 2, 3)
    assert (PRESETS["8b"].suffix_length, PRESETS["8b-literal"].suffix_length) == (16, 2)


def test_budget_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["budget", "exo", "tiny", "demo"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["tiny", "demo"]
    assert lines[-1].split() == ["total", "676,629", "12,414,693"]
    assert main(["budget", "exo", "9b"]) == 2
    assert "presets of exo must be among tiny, demo" in capsys.readouterr().err
    with pytest.raises(ConfigError):
        budget_table(["9b"])


@pytest.mark.parametrize("name", PRESETS)
def test_config_is_read_from_tensors(name: str) -> None:
    config = PRESETS[name]
    state = Exo(config, device="meta").state_dict()
    assert infer_config(state, None) == config


def test_words_are_kept_in_the_file_and_checked() -> None:
    config = replace(PRESETS["tiny"], words=("a", "red"))
    metadata = {"flowcore.config": json.dumps(config.to_dict())}
    assert infer_config(Exo(config, device="meta").state_dict(), metadata) == config
    assert count_parameters(config) == count_parameters(PRESETS["tiny"])
    for words in (["Red"], ["a b"], ["a", "a"], [""], [1]):
        with pytest.raises(ConfigError, match=rf"in lower case and without blanks, got {words[-1]!r}"):
            ExoConfig.from_dict({**config.to_dict(), "words": words})
    with pytest.raises(ConfigError, match=r"words must be at most 250 for this trunk, got 251"):
        replace(config, words=tuple(map(str, range(251))))
    with pytest.raises(ConfigError, match=r"words must be at most 0 for this trunk, got 1"):
        replace(PRESETS["2b"], words=("a",))


@pytest.mark.parametrize(
    "changes",
    [
        {"latent_channels": 64, "diffusion_patch": 2},
        {"num_queries": 0, "lora_rank": 4},
        {"edit_depth": 3, "diffusion_depth": 1},
        {"projector_upscale": 4, "feature_dim": 12},
        {"memory_compares": True},
    ],
)
def test_changed_config_is_read_from_tensors(changes: dict[str, int]) -> None:
    config = replace(PRESETS["tiny"], **changes)
    assert infer_config(Exo(config, device="meta").state_dict(), None) == config


def test_unknown_trunk_needs_metadata() -> None:
    text = {**TRUNKS["tiny"]["text_config"], "num_hidden_layers": 5}
    config = replace(PRESETS["tiny"], trunk={**TRUNKS["tiny"], "text_config": text}, embeds_trunk=False)
    state = Exo(config, device="meta").state_dict()
    with pytest.raises(CheckpointError, match="must state the trunk's settings in its metadata"):
        infer_config(state, None)
    wrong = replace(config, trunk=TRUNKS["demo"]).to_dict()
    with pytest.raises(CheckpointError, match="must have the file's width 64 and 5 layers, got 192 and 6"):
        infer_config(state, {"flowcore.config": json.dumps(wrong)})
    assert infer_config(state, {"flowcore.config": json.dumps(config.to_dict())}) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depth": 3}, "depth must be a field of ExoConfig"),
        ({"trunk": "qwen3-vl-3b"}, "trunk must be one of tiny, demo"),
        ({"trunk": {}}, "trunk must hold the settings of a Qwen3-VL"),
        ({"edit_dim": 0}, "edit_dim must be a whole number of at least 1, got 0"),
        ({"adapter_dim": 24}, "adapter_dim must be a multiple of adapter_head_dim"),
        ({"diffusion_patch": 3}, "diffusion_patch must be 1 or 2, got 3"),
        ({"edit_fraction": 0.0}, "edit_fraction must lie above 0"),
        ({"memory_dim": 30}, "memory_dim must be a multiple of 4"),
        ({"rewrites": True, "embeds_trunk": False}, "rewrites must be false for a trunk by reference"),
    ],
)
def test_bad_settings(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ExoConfig.from_dict({**PRESETS["tiny"].to_dict(), **changes})


def test_trunk_by_name() -> None:
    named = {**PRESETS["2b"].to_dict(), "trunk": "qwen3-vl-2b"}
    assert ExoConfig.from_dict(named) == PRESETS["2b"]


def test_trunk_settings_of_older_files() -> None:
    new = {**TRUNKS["qwen3-vl-2b"], "model_type": "qwen3_vl"}
    text = {key: value for key, value in new["text_config"].items() if key != "rope_parameters"}
    scaling = {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"}
    old = {**new, "text_config": {**text, "rope_theta": 5e6, "rope_scaling": scaling}}
    assert trunk_config(old, source="a") == trunk_config(new, source="b") == TRUNKS["qwen3-vl-2b"]


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen3_vl_moe", None])
def test_trunk_of_another_model(kind: str | None) -> None:
    with pytest.raises(CheckpointError, match="must be a dense Qwen3-VL"):
        trunk_config({"model_type": kind, "hidden_size": 4}, source="folder")


@pytest.mark.parametrize("name", ["tiny", "demo", "demo-fine", "qwen3-vl-4b"])
def test_trunk_settings_are_read_from_tensors(name: str) -> None:
    state = build_trunk(TRUNKS[name], device="meta").state_dict()
    assert infer_trunk(state) == TRUNKS[name]
    assert state["language_model.norm.weight"].device == torch.device("meta")


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        ("text_config", {"num_hidden_layers": 3}, "at least 4 layers"),
        ("vision_config", {"spatial_merge_size": 4}, "spatial_merge_size must be 2"),
        ("text_config", {"head_dim": 32}, "mrope_section must sum to head_dim / 2 = 16"),
    ],
)
def test_trunk_that_does_not_fit(part: str, changes: dict[str, int], message: str) -> None:
    trunk = {**TRUNKS["tiny"], part: {**TRUNKS["tiny"][part], **changes}}
    with pytest.raises(ConfigError, match=message):
        replace(PRESETS["tiny"], trunk=trunk)
