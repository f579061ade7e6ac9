"""Golden cases of the T5Gemma2 text encoder: states after the final norm, and what enters each layer."""

import json
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from flowcore.text.t5gemma2 import network_from_tensors, text_states
from tests.golden.compare import Case, Metadata, Options, Tensors, part


def cases(tensors: Tensors, metadata: Metadata, options: Options) -> Iterator[Case]:
    """Every output of one file, in float32."""
    config = json.loads(metadata["config"])
    config.pop("padding_side")  # of the tokenizer; the file holds token ids
    settings = {**config, "model_type": "t5gemma2_text"}
    network = network_from_tensors(settings, part(tensors, "weight."), source="weights").to(options.device)
    network.eval()
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            seen[name] = inputs[0]

        return hook

    for number, layer in enumerate(network.get_submodule("layers").children()):
        layer.register_forward_pre_hook(keep(f"layer_input.{number}"))
    ids, mask = (tensors[f"input.{name}"].to(options.device) for name in ("input_ids", "attention_mask"))
    with torch.no_grad():
        seen["last_hidden_state"] = text_states(network, ids, mask.bool())
    for name, expected in part(tensors, "output.").items():
        if name in seen:
            yield Case(f"output.{name}", seen[name], expected)
