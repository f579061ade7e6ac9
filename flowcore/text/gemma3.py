"""Gemma-3 text encoder: prompts to token states or to one vector.

The network is transformers' Gemma3TextModel; importing this file imports transformers. Source of the recipe:
hidden states after the final norm of BOS + text, truncated to 128 tokens, padded right, attention masked.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import torch
from einops import rearrange, reduce
from torch import Tensor
from torch.nn import functional
from transformers import Gemma3TextConfig, Gemma3TextModel, PreTrainedTokenizerFast

from ..conditioning import Conditioning
from ..errors import ConfigError
from ..weights.placement import move
from ..weights.strict import assign_strict
from .files import TextFiles, read_text_files, write_text_file

TextMode: TypeAlias = Literal["sequence", "pooled"]
MAX_TOKENS = 128
WHAT = "Gemma3TextModel"


class Gemma3TextEncoder:
    """A Gemma-3 text model with its tokenizer. Its weights are frozen.

    A prompt's result does not depend on the other prompts of the call: padding follows the text, is masked
    in the attention, and every state is read at its own row and position.
    """

    def __init__(self, model: Gemma3TextModel, tokenizer: PreTrainedTokenizerFast) -> None:
        """Join a network and a tokenizer; ConfigError if the network's settings lack the BOS or PAD token."""
        self.bos, self.pad = (_token_id(model.config, name) for name in ("bos_token_id", "pad_token_id"))
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer

    @property
    def width(self) -> int:
        """Length of a token state."""
        return int(self.model.config.hidden_size)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        device: torch.device = self.model.embed_tokens.weight.device
        return device

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> "Gemma3TextEncoder":
        """Move the weights in place and return self; rotary tables stay float32 whatever the dtype."""
        move(self.model, device, dtype)
        return self

    def tokenize(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return token ids `b m` (BOS + text, at most 128, padded right) and the mask `b m`, True = real."""
        if isinstance(prompts, str):
            raise ConfigError(
                f"prompts must be a list of texts, got one text {prompts[:40]!r}; put it in a list"
            )
        rows = [self._token_ids(prompt) for prompt in prompts]
        longest = max((len(row) for row in rows), default=0)
        ids = torch.tensor([row + [self.pad] * (longest - len(row)) for row in rows], dtype=torch.long)
        lengths = torch.tensor([len(row) for row in rows])
        return ids, torch.arange(longest) < rearrange(lengths, "b -> b 1")

    def encode(self, prompts: Sequence[str], mode: TextMode = "sequence") -> Conditioning:
        """Return the prompts' conditioning, float32.

        "sequence": the states `b m d` and the mask `b m`; padded states are zero. "pooled": the mean over the
        tokens (BOS counts), of length 1, as a sequence of one token `b 1 d`.
        The null prompt is the empty text, which is BOS alone.
        Raises: ConfigError if there is no prompt, the mode is unknown, or a token is not the network's.
        """
        if mode not in get_args(TextMode):
            raise ConfigError(f"the text mode must be one of {', '.join(get_args(TextMode))}, got {mode!r}")
        if not prompts:
            raise ConfigError("prompts must be at least one, got none")
        ids, mask = (part.to(self.device) for part in self.tokenize(prompts))
        states = text_states(self.model, ids, mask).float()  # b m d
        states = torch.where(rearrange(mask, "b m -> b m 1"), states, 0.0)
        if mode == "sequence":
            return Conditioning(context=states, context_mask=mask)
        mean = reduce(states, "b m d -> b 1 d", "sum") / reduce(mask.float(), "b m -> b 1 1", "sum")
        return Conditioning(context=functional.normalize(mean, dim=-1, eps=1e-8))

    def unknown_words(self, prompt: str) -> list[str]:
        """Return the parts of a prompt that the tokenizer does not know, in order."""
        found = self.tokenizer(prompt, add_special_tokens=False, return_offsets_mapping=True)
        unknown = self.tokenizer.unk_token_id
        pairs = zip(found["input_ids"], found["offset_mapping"], strict=True)
        return [prompt[start:end] for token, (start, end) in pairs if token == unknown]

    def _token_ids(self, prompt: str) -> list[int]:
        """Return BOS and the first tokens of the text."""
        ids: list[int] = self.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        rows = int(self.model.config.vocab_size)
        foreign = [token for token in ids if token >= rows]
        if foreign:
            word = self.tokenizer.convert_ids_to_tokens(foreign[0])
            raise ConfigError(
                f"the prompt must consist of the network's {rows} tokens, got {word!r}; remove it"
            )
        return [self.bos, *ids[: MAX_TOKENS - 1]]


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
    try:
        settings = config if isinstance(config, Gemma3TextConfig) else Gemma3TextConfig(**config)
    except Exception as err:  # the check behind it has error classes that differ between its versions
        reason = " ".join(str(err).split())
        raise ConfigError(f"settings of the text encoder must fit Gemma-3, got {reason}") from err
    with torch.device(device):
        model = Gemma3TextModel(settings)
    return model.to(dtype=dtype) if dtype is not None else model


def assign_text_weights(model: Gemma3TextModel, state: Mapping[str, Tensor], *, source: str) -> None:
    """Give a network that was built on the meta device its weights and its tables.

    Raises: CheckpointError if a tensor is missing, left over, or of another shape.
    """
    assign_strict(model, state, source=source, what=WHAT)
    for name, module in list(model.named_modules()):
        if "rotary" in name.rsplit(".", 1)[-1]:
            model.set_submodule(name, type(module)(module.config))
    width = float(model.config.hidden_size)
    if getattr(model.embed_tokens, "embed_scale", None) is not None:
        model.embed_tokens.embed_scale = torch.tensor(width**0.5)


def load_text_encoder(
    path_or_name: str | Path, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = torch.float32
) -> Gemma3TextEncoder:
    """Return the text encoder of a Hugging Face folder, a safetensors file, or a bundled name.

    Nothing is looked up on the network.

    Args:
        path_or_name: a folder with config.json, tokenizer.json and model.safetensors (or its parts), or a
            file with the settings in its metadata `flowcore.config` and the tokenizer in the tensor
            `tokenizer_json`; either may instead lie beside the file as config.json, tokenizer.json.
        device: where the weights go.
        dtype: of weights and computation; None keeps the file's.
    Raises: CheckpointError or ConfigError, naming the file.
    """
    return text_encoder_from_files(read_text_files(path_or_name)).to(device, dtype)


def text_encoder_from_files(files: TextFiles) -> Gemma3TextEncoder:
    """Return the text encoder of settings, weights and tokenizer that were read.

    Raises: CheckpointError or ConfigError, naming the file.
    """
    model = build_text_model(files.config, device="meta")
    assign_text_weights(model, files.state, source=files.source)
    return Gemma3TextEncoder(model, files.tokenizer())


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


def _token_id(config: Gemma3TextConfig, name: str) -> int:
    """Return the id of a special token."""
    value = getattr(config, name)
    if not isinstance(value, int):
        raise ConfigError(f"{name} of the text encoder's config must be one number, got {value!r}")
    return value
