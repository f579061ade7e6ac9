"""Files of every version of TinyFlux: detection, loading, writing back, upgrading."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from flowcore.errors import CheckpointError
from flowcore.inspection import convert_file
from flowcore.models import detect, find_architecture, find_layout
from flowcore.models.tinyflux import PRESETS, TinyFlux
from flowcore.models.tinyflux.layouts import (
    current_to_version_3,
    upgrade,
    version,
    version_3_to_current,
    with_qk_scale,
)
from flowcore.weights.checkpoint import build_model, load_model, read_tensors
from tests.support import FORWARD_LIMIT, assert_close
from tests.unit.models.tinyflux.small import BARE, CONFIG, inputs, random_model

V3 = PRESETS["tinyflux-deep-v3"]
OLD = BARE.__class__(**{**BARE.to_dict(), "axes_dims_rope": BARE.axes_dims_rope, "use_lune_expert": True})
PREFIXES = find_architecture("tinyflux").prefixes


def version_3_state() -> dict[str, Tensor]:
    return current_to_version_3(random_model(OLD).state_dict(), OLD)


@pytest.mark.parametrize("prefix", PREFIXES)
def test_prefixes_are_found(prefix: str) -> None:
    row, found = detect([prefix + name for name in TinyFlux(CONFIG, device="meta").state_dict()])
    assert (row.name, found) == ("tinyflux", prefix)


@torch.no_grad()
def test_version_3_runs_as_the_current_version() -> None:
    state = version_3_state()
    assert state["expert_predictor.expert_gate"].shape == (1,)
    assert version(state) == "3"
    loaded = build_model(state, {}, source="v3")
    assert find_layout(loaded.architecture, state).name == "v3"
    assert_close(loaded.model(**inputs()), random_model(OLD)(**inputs()), limit=FORWARD_LIMIT)


def test_version_3_and_back() -> None:
    state = version_3_state()
    again = current_to_version_3(version_3_to_current(state), OLD)
    assert again.keys() == state.keys()
    assert all(torch.equal(again[name], state[name]) for name in state)
    with pytest.raises(CheckpointError, match="must be without Sol and T5 vector"):
        current_to_version_3(random_model().state_dict(), CONFIG)


def test_version_3_has_no_guidance_beside_the_expert() -> None:
    extra = {f"guidance_in.mlp.{i}.{part}": torch.ones(32) for i in (0, 2) for part in ("weight", "bias")}
    loaded = build_model({**version_3_state(), **extra}, {}, source="v3")
    assert not loaded.config.guidance_embeds


@torch.no_grad()
def test_first_4_2_files_lack_the_unused_layer_and_can_get_it() -> None:
    state = random_model().state_dict()
    first = {name: t for name, t in state.items() if "spatial_to_qk_scale" not in name}
    loaded = build_model(first, {}, source="first")
    assert loaded.model.state_dict().keys() == first.keys()
    assert version(first) == "4.2 (first)"
    complete = with_qk_scale(loaded.model.state_dict(), loaded.config)
    assert complete.keys() == state.keys()
    assert not complete["sol_prior.spatial_to_qk_scale.weight"].any()
    assert torch.equal(complete["sol_prior.spatial_to_qk_scale.bias"], torch.ones(2))
    assert version(complete) == "4.1 or 4.2"
    expected = build_model(state, {}, source="whole").model(**inputs())
    assert_close(loaded.model(**inputs()), expected, limit=FORWARD_LIMIT)


@torch.no_grad()
def test_idle_tensors_of_older_files_are_left_out() -> None:
    state = random_model(OLD).state_dict()
    idle = {
        "time_in.sin_basis": torch.zeros(1, 128),
        "double_blocks.0.attn.spatial_to_mod.weight": torch.ones(2, 1, 1, 1),
        "double_blocks.0.attn.spatial_to_mod.bias": torch.ones(2),
    }
    loaded = build_model({**state, **idle}, {}, source="4.1")
    assert_close(loaded.model(**inputs()), random_model(OLD)(**inputs()), limit=FORWARD_LIMIT)


@torch.no_grad()
def test_frequencies_are_taken_from_the_file_and_computed_where_it_has_none() -> None:
    state = random_model().state_dict()
    settings = {"flowcore.config": '{"axes_dims_rope": [4, 6, 6]}'}
    without = {name: t for name, t in state.items() if not name.startswith("rope.")}
    loaded = build_model(without, settings, source="a")
    assert_close(loaded.model(**inputs()), random_model()(**inputs()), limit=FORWARD_LIMIT)
    state["rope.freqs_1"] = state["rope.freqs_1"].bfloat16()
    kept = build_model(state, {}, source="b", dtype=torch.float32).model.rope.freqs_1
    assert torch.equal(kept, state["rope.freqs_1"].float())


def test_containers_of_torch_files(tmp_path: Path) -> None:
    state = {f"_orig_mod.{name}": t for name, t in random_model().state_dict().items()}
    for name in ("model", "state_dict"):
        torch.save({"step": 3, name: state}, tmp_path / f"{name}.pt")
        assert load_model(tmp_path / f"{name}.pt").config.hidden_size == 32


def test_conversion_between_layouts(tmp_path: Path) -> None:
    source = tmp_path / "old.safetensors"
    save_file(version_3_state(), source)
    convert_file(source, tmp_path / "new.safetensors", "diffusion_model")
    assert "diffusion_model.lune_predictor.expert_gate" in read_tensors(tmp_path / "new.safetensors")[0]


def test_upgrade_keeps_what_was_trained_and_names_what_is_fresh() -> None:
    old = random_model(OLD).state_dict()
    fresh = TinyFlux(CONFIG).state_dict()
    state, names = upgrade(old, fresh)
    assert state.keys() == fresh.keys()
    assert all(torch.equal(state[name], old[name]) for name in old)
    assert {name.split(".")[0] for name in names} == {
        "sol_prior",
        "t5_pool",
        "text_balance",
        "double_blocks",
        "single_blocks",
    }
    assert all("spatial_to_mod" in name for name in names if "_blocks" in name)
    del old["img_in.bias"]
    with pytest.raises(CheckpointError, match=r"got 1 tensors that do not: img_in\.bias"):
        upgrade(old, fresh)


def test_missing_and_unexpected_tensors_are_listed(tmp_path: Path) -> None:
    state = random_model().state_dict()
    del state["single_blocks.1.mlp.fc2.bias"]
    state["single_blocks.1.mlp.fc3.bias"] = torch.zeros(1)
    save_file(state, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError) as caught:
        load_model(tmp_path / "a.safetensors")
    message = str(caught.value)
    assert "1 missing (single_blocks.1.mlp.fc2.bias)" in message
    assert "1 unexpected (single_blocks.1.mlp.fc3.bias)" in message
    assert "\n" not in message


def test_saved_keys_are_those_that_were_read(tmp_path: Path) -> None:
    state = random_model().state_dict()
    save_file(state, tmp_path / "a.safetensors")
    again = load_model(tmp_path / "a.safetensors").model.state_dict()
    stored = load_file(tmp_path / "a.safetensors")
    assert again.keys() == stored.keys()
    assert all(torch.equal(again[name], stored[name]) for name in stored)
