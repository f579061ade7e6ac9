"""LoRA files of every architecture: all forms of key change the same weights, and merging can be undone."""

import pytest
import torch
from torch import Tensor, nn

from flowcore.models import find_architecture
from flowcore.weights.lora import layer_shapes, merge, merged_tensors, parse_lora, restore
from flowcore.weights.lora_writing import LoraPair, lora_tensors, to_pairs

from .layouts import ARCHS

RANK, ALPHA = 2, 3.0
DOTTED = (
    "",
    "diffusion_model.",
    "model.diffusion_model.",
    "transformer.",
    "model.",
    "base_model.model.",
    "base_model.model.model.",
)
FLAT = ("lora_unet_", "lora_transformer_", "lycoris_model_", "lycoris_")


def model_of(arch: str) -> nn.Module:
    row = find_architecture(arch)
    torch.manual_seed(0)
    return row.model(row.presets["tiny"])


def pairs_of(state: dict[str, Tensor]) -> dict[str, LoraPair]:
    """An adapter of every layer that has a matrix."""
    torch.manual_seed(1)
    return {
        layer: LoraPair(torch.randn(RANK, width), torch.randn(height, RANK), ALPHA)
        for layer, (height, width) in layer_shapes(state).items()
    }


@pytest.mark.parametrize("arch", ARCHS)
def test_all_forms_of_key_change_the_same_weights(arch: str) -> None:
    state = dict(model_of(arch).state_dict())
    pairs = pairs_of(state)
    expected = {
        f"{layer}.weight": state[f"{layer}.weight"] + ALPHA / RANK * pair.up @ pair.down
        for layer, pair in pairs.items()
    }
    assert len(expected) > 10
    forms = [(prefix, ".", "lora_A", "lora_B") for prefix in DOTTED]
    forms += [(prefix, "_", "lora_down", "lora_up") for prefix in FLAT]
    for prefix, dot, down, up in forms:
        tensors = {}
        for layer, pair in pairs.items():
            name = prefix + layer.replace(".", dot)
            tensors |= {f"{name}.{down}.weight": pair.down, f"{name}.{up}.weight": pair.up}
            tensors[f"{name}.alpha"] = torch.tensor(ALPHA)
        lora = parse_lora(tensors, {}, state, find_architecture(arch), source=prefix)
        assert lora.unused == (), prefix
        merged = merged_tensors(state, lora)
        assert merged.keys() == expected.keys(), prefix
        for name, tensor in expected.items():
            torch.testing.assert_close(merged[name], tensor, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("arch", ARCHS)
def test_no_two_layers_share_a_name_with_underscores(arch: str) -> None:
    row = find_architecture(arch)
    for preset in row.presets.values():
        layers = layer_shapes(row.model(preset, device="meta").state_dict())
        assert len({layer.replace(".", "_") for layer in layers}) == len(layers)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_is_undone_bit_by_bit(arch: str, dtype: torch.dtype) -> None:
    model = model_of(arch).to(dtype)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tensors = lora_tensors(pairs_of(before), architecture=find_architecture(arch))
    lora = parse_lora(tensors, {}, before, find_architecture(arch), source="x")
    originals = merge(model, lora, 0.7)
    assert not torch.equal(model.state_dict()[next(iter(originals))], before[next(iter(originals))])
    restore(model, originals)
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("layout", ["diffusion_model", "kohya"])
def test_what_is_written_is_read_and_written_again(arch: str, layout: str) -> None:
    state = dict(model_of(arch).state_dict())
    row = find_architecture(arch)
    tensors = lora_tensors(pairs_of(state), architecture=row, layout=layout)
    lora = parse_lora(tensors, {}, state, row, source="x")
    again = parse_lora(lora_tensors(to_pairs(lora, state), architecture=row), {}, state, row, source="again")
    first, second = merged_tensors(state, lora), merged_tensors(state, again)
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, rtol=1e-5, atol=1e-5)
