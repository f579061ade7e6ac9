"""Weight files: containers and prefixes of the published ones, and names that others share."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from flowcore.errors import CheckpointError
from flowcore.models import detect, find_architecture
from flowcore.models.single_stream import PRESETS, SingleStreamConfig, SingleStreamDiT
from flowcore.vae.latent_spec import LATENT_SPECS
from flowcore.weights.checkpoint import load_model, save_model

V3 = replace(PRESETS["tiny"], depth=1)
HEAD = replace(V3, variant="head", fourier_stack_depth=1)
PREFIXES = ["", "_orig_mod.", "module.", "module._orig_mod.", "model.diffusion_model.", "diffusion_model."]


def state_of(config: SingleStreamConfig) -> dict[str, Tensor]:
    return SingleStreamDiT(config).state_dict()


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("config", [V3, HEAD], ids=["v3", "head"])
def test_torch_files_with_every_prefix(tmp_path: Path, prefix: str, config: SingleStreamConfig) -> None:
    state = state_of(config)
    torch.save({prefix + name: tensor for name, tensor in state.items()}, tmp_path / "ema.pt")
    loaded = load_model(tmp_path / "ema.pt")
    assert loaded.architecture.name == "single_stream"
    assert loaded.config.variant == config.variant
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.model.state_dict().items())


def test_a_training_state_gives_the_averaged_weights(tmp_path: Path) -> None:
    state = state_of(V3)
    averaged = {f"module.{name}": tensor + 1 for name, tensor in state.items()} | {
        "n_averaged": torch.tensor(3)
    }
    contents = {
        "epoch": 7,
        "global_step": 100,
        "model_state_dict": state,
        "ema_state_dict": averaged,
        "optimizer_state_dict": {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 0.1}]},
        "scheduler_state_dict": {"last_epoch": 100},
    }
    torch.save(contents, tmp_path / "full.pt")
    loaded = load_model(tmp_path / "full.pt")
    assert torch.equal(loaded.model.final_norm.weight, state["final_norm.weight"] + 1)
    del contents["ema_state_dict"]
    torch.save(contents, tmp_path / "full.pt")
    loaded = load_model(tmp_path / "full.pt")
    assert torch.equal(loaded.model.final_norm.weight, state["final_norm.weight"])


def test_own_files_keep_what_shapes_do_not_tell(tmp_path: Path) -> None:
    config = replace(HEAD, in_channels=4, patch_size=4, rope_base=100.0, dropout=0.2)
    save_model(tmp_path / "m.safetensors", state_of(config), architecture="single_stream", config=config)
    assert load_model(tmp_path / "m.safetensors").config == config


def test_half_precision_keeps_filters_exact(tmp_path: Path) -> None:
    torch.save(state_of(V3), tmp_path / "ema.pt")
    model = load_model(tmp_path / "ema.pt", dtype=torch.bfloat16).model
    assert model.blocks[0].fourier_filter.freq_mlp[0].weight.dtype == torch.float32
    assert model.blocks[0].attention_q.weight.dtype == torch.bfloat16


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    state = state_of(V3)
    del state["blocks.0.fourier_filter.gate"]
    state["blocks.0.stray"] = torch.zeros(1)
    torch.save(state, tmp_path / "ema.pt")
    with pytest.raises(CheckpointError, match=r"1 missing \(blocks\.0\.fourier_filter\.gate\); 1 unexpected"):
        load_model(tmp_path / "ema.pt")


def test_lumina_2_is_another_model() -> None:
    shared = [
        "cap_embedder.0.weight",
        "cap_embedder.1.weight",
        "x_embedder.weight",
        "x_pad_token",
        "cap_pad_token",
    ]
    lumina = [*shared, "noise_refiner.0.attention.qkv.weight", "context_refiner.0.attention.qkv.weight"]
    with pytest.raises(CheckpointError, match=r"must be those of a .*single_stream.* model, got 7 others"):
        detect(lumina)


def test_the_row() -> None:
    row = find_architecture("single_stream")
    assert {"tiny", "demo", "v3-384", "v3-768", "head-768"} <= set(row.presets)
    assert row.latent_channels(row.presets["demo"]) == 16
    spec = LATENT_SPECS[row.latent_spec]
    raw = torch.randn(1, 16, 2, 2)
    assert torch.allclose(spec.to_model(raw), 0.3611 * raw)
