"""Low-rank changes of the trunk's attention, under the names that Exo files and peft's adapters have."""

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from ...errors import CheckpointError
from ...ops import Ops
from .config import ExoConfig

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
_PEFT = "base_model.model.language_model."


class LowRank(nn.Module):
    """scale * B A: what is added to the output of one projection; B is zero at first."""

    def __init__(
        self, size_in: int, size_out: int, rank: int, scale: float, *, ops: Ops, **where: Any
    ) -> None:
        super().__init__()
        self.scale = scale
        self.lora_A = ops.linear(size_in, rank, bias=False, **where)
        self.lora_B = ops.linear(rank, size_out, bias=False, **where)
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Return `b n k` for x `b n d`."""
        result: Tensor = self.lora_B(self.lora_A(x)) * self.scale
        return result


class TrunkLora(nn.Module):
    """A `LowRank` for each attention projection of each decoder layer."""

    def __init__(self, config: ExoConfig, *, ops: Ops, **where: Any) -> None:
        super().__init__()
        text = config.trunk["text_config"]
        width, head_dim = text["hidden_size"], text["head_dim"]
        queries, keys = (text[f"num_{kind}_heads"] * head_dim for kind in ("attention", "key_value"))
        sizes = {"q_proj": (width, queries), "k_proj": (width, keys), "v_proj": (width, keys)}
        sizes["o_proj"] = (queries, width)
        scale = config.lora_alpha / config.lora_rank

        def layer() -> nn.ModuleDict:
            parts = {
                name: LowRank(*sizes[name], config.lora_rank, scale, ops=ops, **where) for name in TARGETS
            }
            return nn.ModuleDict({"self_attn": nn.ModuleDict(parts)})

        self.layers = nn.ModuleList(layer() for _ in range(config.num_layers))

    def of_layer(self, index: int) -> Mapping[str, LowRank]:
        """Return the changes of a decoder layer by projection."""
        layer = cast("Any", self.layers[index])
        return dict(layer["self_attn"].items())


def describe_changes(config: ExoConfig) -> dict[str, Any]:
    """Return what a file says of its low-rank changes, JSON-like."""
    return {
        "rank": config.lora_rank,
        "alpha": config.lora_alpha,
        "dropout": 0.0,
        "targets": list(TARGETS),
    }


def project(linear: nn.Module, x: Tensor, change: LowRank | None) -> Tensor:
    """Return the projection of x, changed."""
    result: Tensor = linear(x)
    return result if change is None else result + change(x)


def to_peft(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return LoRA tensors, named as in `TrunkLora`, by the names of a peft adapter of a Qwen3VLModel."""
    return {_PEFT + name: tensor for name, tensor in tensors.items()}


def from_peft(tensors: Mapping[str, Tensor], *, source: str) -> dict[str, Tensor]:
    """Return the tensors of a peft adapter by the names in `TrunkLora`.

    The adapter may be that of a Qwen3VLModel, of one with its output layer, or of the language model alone.
    Raises: CheckpointError if one changes anything but the attention of decoder layers.
    """
    renamed = {}
    for key, tensor in tensors.items():
        name = key[key.find("layers.") :] if "layers." in key and "visual" not in key else ""
        parts = name.split(".")
        if len(parts) != 6 or parts[3] not in TARGETS or parts[4] not in ("lora_A", "lora_B"):
            raise CheckpointError(
                f"{source} must change {', '.join(TARGETS)} of the trunk's decoder alone, got {key}; make "
                "the adapter with these target modules"
            )
        renamed[name] = tensor
    return renamed


def merged(weight: Tensor, change: LowRank) -> Tensor:
    """Return a projection's weights with a change added, in their own dtype; the sum is float32."""
    update = change.scale * (change.lora_B.weight.float() @ change.lora_A.weight.float())
    return (weight.float() + update).to(weight.dtype)


def add_merged(linear: nn.Linear, change: LowRank) -> None:
    """Add a change to a projection's weights for good, as `merged`."""
    with torch.no_grad():
        linear.weight.copy_(merged(linear.weight, change))
