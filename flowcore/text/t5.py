"""T5 text encoder: prompts to token states, padding included (Flan-T5-base, T5 v1.1 XXL, any other T5).

The network is transformers' T5EncoderModel. Recipe: states after the final norm of the text and </s>, cut so
that </s> stays last, always padded right to the model's length; the states of padding are handed on as they
are. Whether attention leaves the padding out differs: TinyFlux's does, FLUX.1's does not.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

from ..conditioning import Conditioning, TextShape
from ..errors import CheckpointError, settings_fit
from ..lazy import LazyTensors, renamed
from .encoder import NetworkTextEncoder
from .files import TextFiles
from .tokens import pad_rows, token_row

WHAT = "T5 encoder"
_EMBEDDING = "encoder.embed_tokens.weight"
_SHARED = "shared.weight"
_FIRST = "encoder.block.0.layer."
_BLOCK = re.compile(r"encoder\.block\.(\d+)\.")


class T5TextEncoder(NetworkTextEncoder):
    """A T5 encoder with its tokenizer. Every prompt becomes as many states as the model reads."""

    kind = "t5"

    def __init__(
        self, model: T5EncoderModel, tokenizer: PreTrainedTokenizerFast, shape: TextShape | None = None
    ) -> None:
        """Join a network and a tokenizer."""
        super().__init__(model, tokenizer, shape)
        self._widen()

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> "T5TextEncoder":
        """Move the weights in place and return self; in float16 the widest layers stay float32."""
        super().to(device, dtype)
        self._widen()
        return self

    def tokenize(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return token ids `b m` (text + </s>, the text cut, padded right to the model's length), mask."""
        known, length = int(self.model.config.vocab_size), self.shape.length
        end, pad = self.tokenizer.eos_token_id, self.tokenizer.pad_token_id
        rows = [[*token_row(self.tokenizer, prompt, known)[: length - 1], end] for prompt in prompts]
        return pad_rows(rows, pad, length)

    def condition(self, ids: Tensor, mask: Tensor, mode: str) -> Conditioning:  # noqa: ARG002 - as the others
        """Return the states `b m d`, float32, those of padding as they are: without a mask."""
        return Conditioning(context=text_states(self.model, ids, mask if self.shape.masks_padding else None))

    def _widen(self) -> None:
        """Bring the layers that overflow in float16 to float32, where transformers keeps them, too."""
        for name, parameter in self.model.named_parameters():
            if name.endswith(".wo.weight") and parameter.dtype == torch.float16:
                parameter.data = parameter.data.float()


def text_states(model: T5EncoderModel, ids: Tensor, mask: Tensor | None) -> Tensor:
    """Return the states `b m d` after the final norm, float32, of ids `b m`; mask None = all are attended."""
    attended = torch.ones_like(ids) if mask is None else mask.long()
    states: Tensor = model(input_ids=ids, attention_mask=attended).last_hidden_state
    return states.float()


def from_files(files: TextFiles, shape: TextShape | None = None) -> T5TextEncoder:
    """Return the text encoder of weights and tokenizer that were read; the tensors tell what settings do not.

    Raises: CheckpointError or ConfigError, naming the file.
    """
    state = _with_shared(files.state)
    model = build_network(files.settings or infer_settings(state, files.source), source=files.source)
    del model.encoder.embed_tokens.weight  # the same as the shared one
    files.assign(model, state, what=WHAT)
    model.encoder.embed_tokens.weight = model.shared.weight
    return T5TextEncoder(model, files.tokenizer(), shape)


def build_network(
    settings: Mapping[str, Any], *, source: str, device: torch.device | str = "meta"
) -> T5EncoderModel:
    """Return a network of a config.json's settings, with random weights, or none on the device "meta".

    Raises: ConfigError if a setting does not fit.
    """
    with settings_fit(source, "T5"):
        config = T5Config(**{key: value for key, value in settings.items() if key != "model_type"})
        with torch.device(device):
            return T5EncoderModel(config)


def infer_settings(state: Mapping[str, Tensor], source: str) -> dict[str, Any]:
    """Return the settings that bare tensors tell: all but constants of every published T5.

    Raises: CheckpointError if a tensor is missing from which they are told.
    """

    def shape(name: str) -> tuple[int, ...]:
        if name not in state or state[name].ndim != 2:
            raise CheckpointError(f"{source} must hold the matrix {name} of a {WHAT}, got none")
        return tuple(state[name].shape)

    gated = f"{_FIRST}1.DenseReluDense.wi_0.weight" in state
    vocabulary, width = shape(_SHARED)
    buckets, heads = shape(f"{_FIRST}0.SelfAttention.relative_attention_bias.weight")
    blocks = [int(match[1]) for match in map(_BLOCK.match, state) if match]
    return {
        "vocab_size": vocabulary,
        "d_model": width,
        "d_kv": shape(f"{_FIRST}0.SelfAttention.q.weight")[0] // heads,
        "d_ff": shape(f"{_FIRST}1.DenseReluDense.{'wi_0' if gated else 'wi'}.weight")[0],
        "num_layers": max(blocks) + 1,
        "num_heads": heads,
        "relative_attention_num_buckets": buckets,
        "feed_forward_proj": "gated-gelu" if gated else "relu",
    }


def _with_shared(state: Mapping[str, Tensor]) -> LazyTensors:
    """Return the tensors with the embedding under one of its two names; files have either or both."""
    names = {name: name for name in state}
    own = names.pop(_EMBEDDING, None)
    return renamed(state, names if own is None else {_SHARED: own, **names})
