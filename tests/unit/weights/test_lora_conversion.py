"""LoRA files from one program's keys to another's: nothing is lost, and nothing is left out in silence."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from flowcore.__main__ import main
from flowcore.errors import CheckpointError, ConfigError
from flowcore.inspection import convert_file
from flowcore.models import ARCHITECTURES, find_architecture
from flowcore.weights.checkpoint import read_tensors, save_model
from flowcore.weights.lora import load_lora, merged_tensors
from flowcore.weights.lora_writing import LoraPair, save_lora

from .loras import CONFIG, draw, random_state

RANK = 4
ARCHS = [row.name for row in ARCHITECTURES if row.name != "exo"]


def shapes_of(arch: str, preset: str = "tiny") -> dict[str, Tensor]:
    row = find_architecture(arch)
    return row.model(row.presets[preset], device="meta").state_dict()


def write(path: Path, arch: str, alpha: float, state: dict[str, Tensor] | None = None) -> Path:
    """A LoRA of a model's blocks in the project's own layout, in float16 as many files are."""
    pairs = {}
    for name, tensor in (shapes_of(arch) if state is None else state).items():
        if "blocks." in name and name.endswith(("qkv.weight", "linear1.weight", "w1.weight", "out.weight")):
            height, width = tensor.shape
            pairs[name[: -len(".weight")]] = LoraPair(
                draw(RANK, width, seed=len(pairs)).half(), draw(height, RANK, seed=len(pairs)).half(), alpha
            )
    assert pairs
    save_lora(path, pairs, architecture=find_architecture(arch), metadata={"flowcore.base_hash": "abc"})
    return path


@pytest.mark.parametrize("arch", ARCHS)
def test_there_and_back_is_the_same_file(arch: str, tmp_path: Path) -> None:
    own = write(tmp_path / "own.safetensors", arch, alpha=7.0)
    line = convert_file(own, tmp_path / "kohya.safetensors", "kohya")
    assert line.endswith(f"LoRA for {arch}, {len(load_file(own)) // 3} layers, layout kohya")
    assert all(key.startswith("lora_unet_") for key in load_file(tmp_path / "kohya.safetensors"))
    convert_file(tmp_path / "kohya.safetensors", tmp_path / "back.safetensors")
    assert same(own, tmp_path / "back.safetensors")
    first, last = (read_tensors(path)[1] for path in (own, tmp_path / "back.safetensors"))
    assert first.keys() == last.keys()
    assert last["flowcore.base_hash"] == "abc"


@pytest.mark.parametrize("alpha", [RANK, 2 * RANK])
def test_parts_of_layers_are_joined_as_they_were(alpha: float, tmp_path: Path) -> None:
    """In the layout of diffusers alpha is in the up matrix, exactly so for a power of two."""
    own = write(tmp_path / "own.safetensors", "flux", alpha)
    convert_file(own, tmp_path / "theirs.safetensors", "diffusers")
    theirs = load_file(tmp_path / "theirs.safetensors")
    assert "transformer.transformer_blocks.0.attn.to_q.lora_A.weight" in theirs
    convert_file(tmp_path / "theirs.safetensors", tmp_path / "back.safetensors")
    if alpha == RANK:
        assert same(own, tmp_path / "back.safetensors")
    convert_file(tmp_path / "back.safetensors", tmp_path / "again.safetensors", "diffusers")
    assert same(tmp_path / "theirs.safetensors", tmp_path / "again.safetensors")
    state = {name: torch.zeros(tensor.shape) for name, tensor in shapes_of("flux").items()}
    first, second = (
        merged_tensors(state, load_lora(tmp_path / f"{name}.safetensors", state, find_architecture("flux")))
        for name in ("own", "back")
    )
    assert first.keys() == second.keys()
    assert all(torch.equal(second[name], tensor) for name, tensor in first.items())


def same(first: Path, second: Path) -> bool:
    one, other = load_file(first), load_file(second)
    return one.keys() == other.keys() and all(
        torch.equal(other[key], tensor) and other[key].dtype == tensor.dtype for key, tensor in one.items()
    )


def test_the_form_of_tinyflux_itself(tmp_path: Path) -> None:
    own = write(tmp_path / "own.safetensors", "tinyflux", alpha=6.0)
    convert_file(own, tmp_path / "native.safetensors", "native")
    tensors, metadata = read_tensors(tmp_path / "native.safetensors")
    assert "single_blocks_0_attn_qkv.lora_A" in tensors
    assert json.loads(metadata["config_json"])["layer_specs"]["single_blocks.0.attn.qkv"]["alpha"] == 6.0
    convert_file(tmp_path / "native.safetensors", tmp_path / "back.safetensors", "diffusion_model")
    assert same(own, tmp_path / "back.safetensors")
    with pytest.raises(
        ConfigError, match="must be one of diffusion_model, kohya, diffusers, native, got 'x'"
    ):
        convert_file(own, tmp_path / "x.safetensors", "x")


def test_a_model_of_another_size_is_given(tmp_path: Path) -> None:
    state = random_state()
    own = write(tmp_path / "own.safetensors", "flux", alpha=3.0, state=state)
    with pytest.raises(
        ConfigError, match=r"must fit a flux model of a known size, tiny, .* pass its model as"
    ):
        convert_file(own, tmp_path / "x.safetensors", "kohya")
    save_model(tmp_path / "model.safetensors", state, architecture="flux", config=CONFIG)
    convert_file(own, tmp_path / "kohya.safetensors", "kohya", base=tmp_path / "model.safetensors")
    assert len(load_file(tmp_path / "kohya.safetensors")) == len(load_file(own))
    tiny = write(tmp_path / "tiny.safetensors", "flux", alpha=3.0)
    with pytest.raises(
        CheckpointError, match=r"must fit the model .*model\.safetensors, got layers of other"
    ):
        convert_file(tiny, tmp_path / "x.safetensors", base=tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=r"--base must go with a LoRA, got model\.safetensors"):
        convert_file(tmp_path / "model.safetensors", tmp_path / "x.safetensors", base=own)
    assert not (tmp_path / "x.safetensors").exists()


def test_keys_without_a_place_are_named(tmp_path: Path) -> None:
    tensors = load_file(write(tmp_path / "own.safetensors", "flux", alpha=4.0))
    save_file({**tensors, "lora_te1_text.lora_down.weight": torch.zeros(1)}, tmp_path / "more.safetensors")
    expected = "flux model alone, got 1 others: lora_te1_text.lora_down.weight; take them out"
    with pytest.raises(CheckpointError, match=expected):
        convert_file(tmp_path / "more.safetensors", tmp_path / "x.safetensors")
    save_file({"who.knows.lora_A.weight": torch.zeros(1, 1)}, tmp_path / "foreign.safetensors")
    with pytest.raises(
        CheckpointError, match="must be a LoRA for xut, flux, tinyflux, single_stream, exo, got"
    ):
        convert_file(tmp_path / "foreign.safetensors", tmp_path / "x.safetensors")


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = write(tmp_path / "own.safetensors", "xut", alpha=4.0)
    assert main(["convert", str(own), str(tmp_path / "k.safetensors"), "--layout", "kohya"]) == 0
    assert capsys.readouterr().out.endswith("layout kohya\n")
    assert main(["convert", str(own), str(tmp_path / "d.safetensors"), "--layout", "diffusers"]) != 0
    (line,) = capsys.readouterr().err.splitlines()
    assert "must have names there, got backbone" in line
    assert not (tmp_path / "d.safetensors").exists()
