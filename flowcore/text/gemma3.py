"""Gemma-3 text encoder: prompts to token states or to one vector.

The network is transformers' Gemma3TextModel; importing this file imports transformers. Source of the recipe:
hidden states after the final norm of BOS + text, truncated to 128 tokens, padded right, attention masked.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from transformers import Gemma3TextConfig, Gemma3TextModel, PreTrainedTokenizerFast

from ..conditioning import Conditioning, TextShape
from ..errors import settings_fit
from .encoder import NetworkTextEncoder, token_id
from .files import TextFiles, plain_settings, read_text_files, write_text_file
from .pooling import pool_states
from .tokens import pad_rows, token_row

MAX_TOKENS = 128
WHAT = "Gemma3TextModel"


class Gemma3TextEncoder(NetworkTextEncoder):
    """A Gemma-3 text model with its tokenizer.

    A prompt's result does not depend on the other prompts of the call: padding follows the text, is masked
    in the attention, and every state is read at its own row and position.
    """

    kind = "gemma3"
    modes = ("sequence", "pooled")

    def __init__(
        self, model: Gemma3TextModel, tokenizer: PreTrainedTokenizerFast, shape: TextShape | None = None
    ) -> None:
        """Join a network and a tokenizer; ConfigError if the network's settings lack the BOS or PAD token."""
        super().__init__(model, tokenizer, shape)
        self.bos, self.pad = (token_id(model.config, name) for name in ("bos_token_id", "pad_token_id"))

    def tokenize(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return token ids `b m` (BOS + text, cut at 128 or the model's length, padded right), mask."""
        known, length = int(self.model.config.vocab_size), min(MAX_TOKENS, self.shape.length)
        rows = [[self.bos, *token_row(self.tokenizer, prompt, known)][:length] for prompt in prompts]
        return pad_rows(rows, self.pad, max(len(row) for row in rows))

    def condition(self, ids: Tensor, mask: Tensor, mode: str) -> Conditioning:
        """Return the conditioning of token ids, float32.

        "sequence": the states `b m d` and the mask `b m`; padded states are zero. "pooled": the mean over the
        tokens (BOS counts), of length 1, as a sequence of one token `b 1 d`.
        The empty text is BOS alone.
        """
        states = text_states(self.model, ids, mask).float()  # b m d
        if mode == "pooled":
            return Conditioning(context=pool_states(states, mask))
        states = torch.where(rearrange(mask, "b m -> b m 1"), states, 0.0)
        return Conditioning(context=states, context_mask=mask)


def text_states(model: Gemma3TextModel, ids: Tensor, mask: Tensor) -> Tensor:
    """Return the states `b m d` after the final norm, of ids `b m` and mask `b m` (True = real)."""
    positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    output = model(input_ids=ids, attention_mask=mask.long(), position_ids=positions, use_cache=False)
    states: Tensor = output.last_hidden_state
    return states


def build_text_model(
    config: Mapping[str, Any] | Gemma3TextConfig,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> Gemma3TextModel:
    """Return a network of the given settings, with random weights, or none on the device "meta".

    Raises: ConfigError if a setting does not fit.
    """
    with settings_fit("the text encoder", "Gemma-3"):
        settings = config if isinstance(config, Gemma3TextConfig) else Gemma3TextConfig(**config)
    with torch.device(device):
        model = Gemma3TextModel(settings)
    return model.to(dtype=dtype) if dtype is not None else model


def load_text_encoder(
    path_or_name: str | Path, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = torch.float32
) -> Gemma3TextEncoder:
    """Return the Gemma-3 text encoder of a folder, a safetensors file, or a bundled name.

    dtype: of weights and computation; None keeps the file's.
    Raises: CheckpointError or ConfigError, naming the file.
    """
    (files,) = read_text_files(path_or_name)
    encoder = from_files(replace(files, device=device, dtype=dtype))
    encoder.to(device)
    return encoder


def from_files(files: TextFiles, shape: TextShape | None = None) -> Gemma3TextEncoder:
    """Return the text encoder of settings, weights and tokenizer that were read.

    Raises: CheckpointError or ConfigError, naming the file.
    """
    settings = files.settings or {}
    if settings.get("model_type") == "gemma3":
        settings = plain_settings(settings["text_config"])
    model = build_text_model(settings, device="meta")
    files.assign(model, files.state, what=WHAT)
    for name, module in list(model.named_modules()):  # tables, which the meta device left empty
        if "rotary" in name.rsplit(".", 1)[-1]:
            model.set_submodule(name, type(module)(module.config))
    if getattr(model.embed_tokens, "embed_scale", None) is not None:
        model.embed_tokens.embed_scale = torch.tensor(float(model.config.hidden_size) ** 0.5)
    return Gemma3TextEncoder(model, files.tokenizer(), shape)


def save_text_encoder(
    path: str | Path,
    model: Gemma3TextModel,
    tokenizer: PreTrainedTokenizerFast,
    *,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write network, settings and tokenizer to one safetensors file, replacing an earlier one in one step."""
    write_text_file(
        path,
        model.state_dict(),
        config=model.config.to_diff_dict(),
        tokenizer=tokenizer,
        metadata=metadata or {},
    )
