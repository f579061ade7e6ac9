"""Key tables of Flux's control LoRAs."""

from collections.abc import Collection, Mapping

from torch import Tensor

from flowcore.models import find_architecture
from flowcore.models.flux import Flux, infer_config
from flowcore.models.flux.lora import control_lora_shapes
from flowcore.weights.lora import layer_shapes, parse_lora


def is_control_lora(names: Collection[str]) -> bool:
    """Whether the names are those of a control LoRA, which widens the input layer and sets the norms."""
    return "img_in.lora_A.weight" in names and "single_blocks.0.norm.key_norm.scale" in names


def control_lora_fault(tensors: Mapping[str, Tensor]) -> str:
    """What keeps meta tensors from being the control LoRA of a Flux model, or ""."""
    state: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.endswith(".lora_A.weight"):
            layer = name.removesuffix(".lora_A.weight")
            state[f"{layer}.weight"] = tensor.new_empty(
                tensors[f"{layer}.lora_B.weight"].shape[0], tensor.shape[1]
            )
        elif name.endswith(".lora_B.bias"):
            state[f"{name.removesuffix('.lora_B.bias')}.bias"] = tensor
        elif name.endswith(".scale"):
            state[name] = tensor
    config = infer_config(state)
    built = Flux(config, device="meta").state_dict()
    rank = max(tensor.shape[0] for name, tensor in tensors.items() if name.endswith(".lora_A.weight"))
    expected = control_lora_shapes(config, layer_shapes(built), rank)
    listed = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    different = sorted(name for name in {*expected, *listed} if expected.get(name) != listed.get(name))
    unused = parse_lora(tensors, {}, built, find_architecture("flux"), source="table").unused
    parts = (("differ", different), ("belong to nothing", unused))
    return "; ".join(f"{len(names)} names {what}, first {names[0]}" for what, names in parts if names)
