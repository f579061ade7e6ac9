"""LoRA files in every layout that is written."""

from pathlib import Path

import pytest
from torch import Tensor

from flowcore.errors import ConfigError
from flowcore.models import find_architecture
from flowcore.weights.checkpoint import read_tensors
from flowcore.weights.lora import load_lora, merged_tensors
from flowcore.weights.lora_writing import lora_tensors, save_lora, to_pairs
from tests.support import assert_close

from .loras import LIMIT, LINEAR1, PROJ, QKV, RANK, ROW, draw, pair, parse, random_state


@pytest.fixture
def state() -> dict[str, Tensor]:
    return random_state()


@pytest.mark.parametrize("layout", ["diffusion_model", "kohya", "diffusers"])
def test_written_files_are_read_back(layout: str, tmp_path: Path, state: dict[str, Tensor]) -> None:
    layers = (QKV, PROJ, LINEAR1, "single_blocks.0.linear2", "final_layer.adaLN_modulation.1", "img_in")
    pairs = {layer: pair(layer, state) for layer in layers}
    path = tmp_path / "lora.safetensors"
    save_lora(path, pairs, architecture=ROW, layout=layout, metadata={"flowcore.base_hash": "abc"})
    metadata = read_tensors(path)[1]
    assert (metadata["flowcore.arch"], metadata["flowcore.lora_rank"]) == ("flux", str(RANK))
    assert metadata["flowcore.base_hash"] == "abc"
    lora = load_lora(path, state, ROW)
    assert lora.unused == ()
    merged = merged_tensors(state, lora)
    assert set(merged) == {f"{layer}.weight" for layer in layers}
    for layer, (down, up, alpha) in pairs.items():
        expected = state[f"{layer}.weight"] + alpha / RANK * up @ down
        assert_close(merged[f"{layer}.weight"], expected, limit=LIMIT)


@pytest.mark.parametrize("is_shared", [True, False])
def test_parts_become_one_pair(is_shared: bool, state: dict[str, Tensor]) -> None:
    theirs = lora_tensors(
        {QKV: pair(QKV, state), PROJ: pair(PROJ, state)}, architecture=ROW, layout="diffusers"
    )
    if not is_shared:
        key = "transformer.transformer_blocks.0.attn.to_k.lora_A.weight"
        theirs[key] = -theirs[key]
    lora = parse(theirs, state)
    pairs = to_pairs(lora, state)
    assert pairs[QKV].down.shape == (RANK if is_shared else 3 * RANK, 16)
    again = parse(lora_tensors(pairs, architecture=ROW), state)
    expected = merged_tensors(state, lora)
    for name, tensor in merged_tensors(state, again).items():
        assert_close(tensor, expected[name], limit=LIMIT)
    with pytest.raises(ConfigError, match="a LoRA to rewrite must hold pairs alone, got diff in"):
        to_pairs(parse({f"{PROJ}.diff": draw(16, 16)}, state), state)


def test_layouts_that_do_not_exist_are_named(state: dict[str, Tensor]) -> None:
    pairs = {PROJ: pair(PROJ, state)}
    with pytest.raises(ConfigError, match="the LoRA layout must be one of"):
        lora_tensors(pairs, architecture=ROW, layout="peft")
    with pytest.raises(ConfigError, match="must have names there, got double_blocks"):
        lora_tensors(pairs, architecture=find_architecture("xut"), layout="diffusers")
