"""CLIP text encoder: prompts to one vector each, without the projection.

The network is transformers' CLIPTextModel. Recipe: <|startoftext|> + text + <|endoftext|>, cut so that the
last stays, padded with it to 77; the vector is the state after the final norm at the first <|endoftext|>.
Attention is causal, so that padding has no influence.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast

from ..conditioning import Conditioning, TextShape
from ..errors import CheckpointError, settings_fit
from .encoder import NetworkTextEncoder
from .files import TextFiles, plain_settings
from .tokens import pad_rows, token_row

WHAT = "CLIP text model"
HEAD_WIDTH = 64
"""Of every published CLIP text model; tensors do not tell it."""
_GELU_FROM = 1024
"""Width from which published models have GELU in place of its fast approximation."""
_LAYER = re.compile(r"encoder\.layers\.(\d+)\.")


class ClipTextEncoder(NetworkTextEncoder):
    """A CLIP text model with its tokenizer: gives `pooled` alone."""

    kind = "clip"

    def __init__(
        self, model: nn.Module, tokenizer: PreTrainedTokenizerFast, shape: TextShape | None = None
    ) -> None:
        """Join a network, as `build_network` gives it, and a tokenizer."""
        super().__init__(model, tokenizer, shape)

    @property
    def pooled_width(self) -> int:
        """Length of the vector."""
        return self.width

    def tokenize(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return token ids `b 77` (start + text + end, the text cut, padded with ends) and the mask."""
        config = self.model.config
        length, known = int(config.max_position_embeddings), int(config.vocab_size)
        start, end = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        rows = [[start, *token_row(self.tokenizer, prompt, known)[: length - 2], end] for prompt in prompts]
        return pad_rows(rows, end, length)

    def condition(self, ids: Tensor, mask: Tensor, mode: str) -> Conditioning:  # noqa: ARG002 - as the others
        """Return the vector `b d` of each row, float32."""
        states = text_states(self.model, ids)
        first_end = (ids == self.tokenizer.eos_token_id).int().argmax(dim=1)
        return Conditioning(pooled=states[torch.arange(len(ids), device=ids.device), first_end])


def text_states(model: nn.Module, ids: Tensor) -> Tensor:
    """Return the states `b m d` after the final norm, float32, of ids `b m`."""
    positions = torch.arange(ids.shape[1], device=ids.device)[None]
    states: Tensor = model(input_ids=ids, position_ids=positions).last_hidden_state
    return states.float()


def from_files(files: TextFiles, shape: TextShape | None = None) -> ClipTextEncoder:
    """Return the text encoder of weights and tokenizer that were read; the tensors tell what settings do not.

    Raises: CheckpointError or ConfigError, naming the file.
    """
    model = build_network(files.settings or infer_settings(files.state, files.source), source=files.source)
    files.assign(model, files.state, what=WHAT)
    embeddings: Any = model.get_submodule("embeddings")
    embeddings.position_ids = torch.arange(embeddings.position_embedding.num_embeddings)[None]
    return ClipTextEncoder(model, files.tokenizer(), shape)


def build_network(
    settings: Mapping[str, Any], *, source: str, device: torch.device | str = "meta"
) -> nn.Module:
    """Return a network of a config.json's settings, with random weights, or none on the device "meta".

    Its parameters have the bare names `embeddings.*`, `encoder.*`, `final_layer_norm.*`.
    Raises: ConfigError if a setting does not fit.
    """
    if settings.get("model_type") == "clip":
        settings = plain_settings(settings.get("text_config") or {})
    with settings_fit(source, "CLIP"):
        config = CLIPTextConfig(**{key: value for key, value in settings.items() if key != "model_type"})
        with torch.device(device):
            model: Any = CLIPTextModel(config)
    inner: nn.Module = getattr(model, "text_model", model)  # transformers before 5 wraps it
    return inner


def infer_settings(state: Mapping[str, Tensor], source: str) -> dict[str, Any]:
    """Return the settings that bare tensors tell, with heads and activation as in published models.

    Raises: CheckpointError if a tensor is missing from which they are told, or no published width is theirs.
    """

    def shape(name: str) -> tuple[int, ...]:
        if name not in state or state[name].ndim != 2:
            raise CheckpointError(f"{source} must hold the matrix {name} of a {WHAT}, got none")
        return tuple(state[name].shape)

    vocabulary, width = shape("embeddings.token_embedding.weight")
    if width % HEAD_WIDTH:
        raise CheckpointError(
            f"the width of the {WHAT} {source} must be a multiple of {HEAD_WIDTH} without a config.json, "
            f"got {width}; copy its config.json beside it"
        )
    layers = [int(match[1]) for match in map(_LAYER.match, state) if match]
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": shape("encoder.layers.0.mlp.fc1.weight")[0],
        "num_hidden_layers": max(layers) + 1,
        "num_attention_heads": width // HEAD_WIDTH,
        "max_position_embeddings": shape("embeddings.position_embedding.weight")[0],
        "hidden_act": "quick_gelu" if width < _GELU_FROM else "gelu",
    }
