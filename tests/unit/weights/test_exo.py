"""Exo's files: round trips with and without the trunk, and what is said of a trunk that does not fit."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from flowcore.errors import CheckpointError, ConfigError
from flowcore.inspection import describe_file
from flowcore.models.exo import Exo
from flowcore.models.exo.trunk import build_trunk
from flowcore.models.exo.trunk_config import TRUNKS
from flowcore.weights.exo import fingerprint, load_exo, load_trunk, save_exo
from tests.exo_recomputed import random_exo
from tests.support import FORWARD_LIMIT, assert_close

IDS = torch.tensor([[256, 65, 66, 67, 257, 256]])


@pytest.fixture(scope="module")
def trunk_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen3-VL as it is published: prefixed names, an output layer, two shards."""
    folder = tmp_path_factory.mktemp("trunk")
    torch.manual_seed(5)
    trunk = build_trunk(TRUNKS["tiny"])
    with torch.no_grad():
        trunk.language_model.norm.weight.normal_()
    state = {f"model.{name}": tensor for name, tensor in trunk.state_dict().items()}
    state["lm_head.weight"] = torch.zeros(512, 64)
    files = {name: f"model-{number % 2}.safetensors" for number, name in enumerate(state)}
    for file in set(files.values()):
        save_file({name: state[name] for name in state if files[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen3_vl", **TRUNKS["tiny"]}))
    return folder


def attached(trunk_folder: Path) -> Exo:
    model = random_exo(embeds_trunk=False, lora_rank=2)
    model.attach(load_trunk(trunk_folder))
    return model


def run(model: Exo) -> torch.Tensor:
    z, t = torch.randn(1, 16, 4, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([0.5])
    with torch.no_grad():
        return model(z, t, IDS)


def check_same(found: Exo, model: Exo) -> None:
    """The same weights exactly, and what they give; sums over mapped files are rounded otherwise."""
    state = model.state_dict()
    assert found.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in found.state_dict().items())
    assert_close(run(found), run(model), limit=FORWARD_LIMIT)


def test_embedded_trunk_goes_round(tmp_path: Path) -> None:
    model, file = random_exo(), tmp_path / "exo.safetensors"
    save_exo(file, model)
    loaded = load_exo(file)
    check_same(loaded.model, model)
    assert json.loads(loaded.metadata["exo.trunk"]) == {"kind": "embedded"}
    assert describe_file(file)["architecture"] == "exo"
    half = load_exo(file, dtype=torch.bfloat16).model
    assert half.trunk.language_model.norm.weight.dtype == torch.bfloat16
    assert half.trunk.language_model.rotary_emb.inv_freq.dtype == torch.float32


def test_referenced_trunk_stays_outside(tmp_path: Path, trunk_folder: Path) -> None:
    model, file = attached(trunk_folder), tmp_path / "exo.safetensors"
    save_exo(file, model, trunk=str(trunk_folder))
    with safe_open(file, framework="pt") as opened:
        names, metadata = set(opened.keys()), opened.metadata()
    assert not any(name.startswith("trunk.") for name in names)
    assert "lora.layers.3.self_attn.o_proj.lora_B.weight" in names
    assert metadata["exo.format"] == "exo/1"
    assert json.loads(metadata["exo.trunk"])["fingerprint"] == fingerprint(model.trunk)
    assert json.loads(metadata["exo.lora"]) == {
        "rank": 2, "alpha": 32.0, "dropout": 0.0, "targets": ["q_proj", "k_proj", "v_proj", "o_proj"],
    }  # fmt: skip
    for loaded in (load_exo(file), load_exo(file, trunk=trunk_folder)):
        check_same(loaded.model, model)
        assert not any(p.requires_grad for p in loaded.model.trunk.parameters())
        assert not any("lm_head" in name for name, _ in loaded.model.named_parameters())


def test_trunk_with_other_weights_is_refused(tmp_path: Path, trunk_folder: Path) -> None:
    model, file = attached(trunk_folder), tmp_path / "exo.safetensors"
    save_exo(file, model, trunk="Qwen/Some-VL")
    other = tmp_path / "other"
    other.mkdir()
    save_file(build_trunk(TRUNKS["tiny"]).state_dict(), other / "model.safetensors")
    (other / "config.json").write_text((trunk_folder / "config.json").read_text())
    with pytest.raises(CheckpointError, match=r"made for another trunk, pass that one") as caught:
        load_exo(file, trunk=other)
    assert "Qwen/Some-VL" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert load_exo(file, trunk=other, any_trunk=True).model.trunk is not None


def test_trunk_of_another_size_is_refused(tmp_path: Path) -> None:
    model, file = random_exo(embeds_trunk=False), tmp_path / "exo.safetensors"
    save_exo(file, model)
    text = {**TRUNKS["tiny"]["text_config"], "num_hidden_layers": 5}
    config = {**TRUNKS["tiny"], "text_config": text}
    save_file(build_trunk(config).state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3_vl", **config}))
    file.rename(tmp_path.parent / "exo.safetensors")
    with pytest.raises(CheckpointError, match=r"must have width 64 and 4 layers, as .*, got 64 and 5"):
        load_exo(tmp_path.parent / "exo.safetensors", trunk=tmp_path)


def test_trunk_folder_of_another_model(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"must be a folder with config\.json, got none"):
        load_trunk(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 4096}))
    with pytest.raises(CheckpointError, match=r"must be a dense Qwen3-VL .*, got llama"):
        load_trunk(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="must be JSON"):
        load_trunk(tmp_path)


def test_incomplete_trunk(tmp_path: Path, trunk_folder: Path) -> None:
    state = build_trunk(TRUNKS["tiny"]).state_dict()
    del state["language_model.norm.weight"]
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((trunk_folder / "config.json").read_text())
    with pytest.raises(CheckpointError, match=r"1 missing \(language_model\.norm\.weight\)"):
        load_trunk(tmp_path)


def test_trunk_that_is_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    model, file = random_exo(embeds_trunk=False), tmp_path / "exo.safetensors"
    save_exo(file, model, trunk="flowcore/does-not-exist")
    with pytest.raises(CheckpointError, match=r"flowcore/does-not-exist must be a folder, or a repository"):
        load_exo(file)
    save_exo(file, model)
    with pytest.raises(CheckpointError, match="must name its trunk or be given one"):
        load_exo(file)
    with pytest.raises(ConfigError, match="must have a trunk before it is used"):
        run(model)


def test_other_models_are_refused(tmp_path: Path) -> None:
    from flowcore.models.xut import PRESETS, XUDiT
    from flowcore.weights.checkpoint import save_model

    file = tmp_path / "xut.safetensors"
    save_model(file, XUDiT(PRESETS["tiny"]).state_dict(), architecture="xut", config=PRESETS["tiny"])
    with pytest.raises(CheckpointError, match="must be an Exo file, got a xut model"):
        load_exo(file)


def test_stored_settings_are_kept(tmp_path: Path) -> None:
    model, file = random_exo(edit_fraction=0.5), tmp_path / "exo.safetensors"
    save_exo(file, model)
    assert load_exo(file).config == replace(model.config, edit_fraction=0.5)
