"""Low-rank changes added to the trunk for good: the same pictures without them."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from flowcore.__main__ import main
from flowcore.errors import CheckpointError
from flowcore.exo.merging import merge_file
from flowcore.models.exo import Exo
from flowcore.models.exo.trunk import build_trunk
from flowcore.models.exo.trunk_config import TRUNKS
from flowcore.weights.exo import load_exo, load_trunk, save_exo, trunk_reference
from tests.exo_recomputed import random_exo
from tests.support import CHAIN_LIMIT, assert_close

IDS = torch.tensor([[256, 97, 98, 99, 257]])


def run(model: Exo) -> torch.Tensor:
    z, t = torch.randn(1, 16, 4, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([0.5])
    with torch.no_grad():
        return model(z, t, IDS)


def test_a_trunk_by_reference(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trunk, out = tmp_path / "trunk", tmp_path / "out"
    trunk.mkdir()
    state = {f"model.{name}": tensor for name, tensor in build_trunk(TRUNKS["tiny"]).state_dict().items()}
    state["lm_head.weight"] = torch.ones(512, 64)
    save_file(state, trunk / "model.safetensors")
    (trunk / "config.json").write_text(json.dumps({"model_type": "qwen3_vl", **TRUNKS["tiny"]}))
    (trunk / "tokenizer.json").write_text("{}")
    model = random_exo(embeds_trunk=False, lora_rank=2, lora_alpha=6.0)
    model.attach(load_trunk(trunk))
    file = tmp_path / "exo.safetensors"
    save_exo(file, model, trunk=str(trunk), metadata={"flowcore.vae": "some-vae"})
    assert main(["merge", str(file), str(out)]) == 0
    assert (
        capsys.readouterr().out
        == f"{out}: 16 projections of the trunk merged, exo.safetensors without lora\n"
    )
    changed = load_file(out / "model.safetensors")
    assert changed.keys() == state.keys()
    different = {name for name in state if not torch.equal(changed[name], state[name])}
    assert len(different) == 16
    assert all(".self_attn." in name for name in different)
    assert (out / "tokenizer.json").read_text() == "{}"
    found = load_exo(out / "exo.safetensors")
    assert found.config.lora_rank == 0
    assert found.metadata["flowcore.vae"] == "some-vae"
    assert_close(run(found.model), run(load_exo(file).model), limit=CHAIN_LIMIT)
    refused = rf"must have the merged changes None, got [0-9a-f]{{12}} in {out}; the file was made"
    with pytest.raises(CheckpointError, match=refused):  # its changes are in that trunk already
        load_exo(file, trunk=out)
    with pytest.raises(
        CheckpointError, match=rf"must have the merged changes [0-9a-f]{{12}}, got None in {trunk}"
    ):
        load_exo(out / "exo.safetensors", trunk=trunk)
    assert load_exo(file, trunk=out, any_trunk=True).model.lora is not None
    assert trunk_reference("x", out)["merged"] == json.loads(found.metadata["exo.trunk"])["merged"]
    assert "merged" not in trunk_reference("x", trunk)
    with safe_open(out / "exo.safetensors", framework="pt") as opened:
        assert not [name for name in opened.keys() if name.startswith(("lora.", "trunk."))]  # noqa: SIM118
        assert "exo.lora" not in opened.metadata()


def test_a_trunk_inside_the_file_keeps_its_dtype(tmp_path: Path) -> None:
    model = random_exo(lora_rank=2).bfloat16()
    save_exo(tmp_path / "exo.safetensors", model)
    merge_file(tmp_path / "exo.safetensors", tmp_path / "out")
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["exo.safetensors"]
    found = load_exo(tmp_path / "out" / "exo.safetensors", dtype=torch.float32).model
    assert found.lora is None
    name = "language_model.layers.2.self_attn.o_proj.weight"
    change = model.lora.of_layer(2)["o_proj"]
    update = 16.0 * change.lora_B.weight.float() @ change.lora_A.weight.float()  # alpha 32, rank 2
    expected = (model.trunk.get_parameter(name).float() + update).bfloat16().float()
    assert torch.equal(found.trunk.get_parameter(name), expected)


def test_what_cannot_be_merged_is_named(tmp_path: Path) -> None:
    file = tmp_path / "exo.safetensors"
    save_exo(file, random_exo())
    with pytest.raises(
        CheckpointError, match=r"must hold low-rank changes of its trunk \(lora\.\), got none"
    ):
        merge_file(file, tmp_path / "out")
    with pytest.raises(CheckpointError, match="must be a new or an empty folder, got one with files"):
        merge_file(file, tmp_path)
    with pytest.raises(CheckpointError, match="must be an Exo file, got a xut model"):
        merge_file("xut-demo", tmp_path / "out")
