"""Prompts to token ids: one row each, cut and padded to a length."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from ..errors import CheckpointError, ConfigError

SPECIAL_TOKENS: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        "Gemma": {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>", "unk_token": "<unk>"},
        "T5": {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"},
        "CLIP": {
            "bos_token": "<|startoftext|>",
            "eos_token": "<|endoftext|>",
            "pad_token": "<|endoftext|>",
            "unk_token": "<|endoftext|>",
        },
    }
)
"""Family of tokenizers -> its names of the special tokens."""


def tokenizer_from_json(text: str, *, source: str, family: str = "Gemma") -> PreTrainedTokenizerFast:
    """Return the tokenizer of a tokenizer.json's text, with the family's names of the special tokens.

    Raises: CheckpointError if the text is no tokenizer, or lacks a special token.
    """
    try:
        backend = Tokenizer.from_str(text)
    except Exception as err:  # the library raises bare Exception
        raise CheckpointError(f"the tokenizer of {source} must be a tokenizer.json, got {err}") from err
    special = SPECIAL_TOKENS[family]
    absent = sorted({token for token in special.values() if backend.token_to_id(token) is None})
    if absent:
        raise CheckpointError(
            f"the tokenizer of {source} must have the tokens of {family}, got none for {absent}; "
            "pass the tokenizer.json of that encoder beside it"
        )
    backend.no_truncation()
    backend.no_padding()
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def check_prompts(prompts: Sequence[str]) -> None:
    """Raises: ConfigError if prompts are one text instead of a list, or none."""
    if isinstance(prompts, str):
        raise ConfigError(f"prompts must be a list of texts, got one text {prompts[:40]!r}; put it in a list")
    if not prompts:
        raise ConfigError("prompts must be at least one, got none")


def token_row(tokenizer: PreTrainedTokenizerFast, prompt: str, rows: int) -> list[int]:
    """Return the ids of a text without special tokens.

    rows: how many tokens the network knows.
    Raises: ConfigError that names a token which the network does not know.
    """
    ids: list[int] = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    foreign = next((token for token in ids if token >= rows), None)
    if foreign is not None:
        word = tokenizer.convert_ids_to_tokens(foreign)
        raise ConfigError(f"the prompt must consist of the network's {rows} tokens, got {word!r}; remove it")
    return ids


def pad_rows(
    rows: Sequence[Sequence[int]], pad: int, length: int, *, side: str = "right"
) -> tuple[Tensor, Tensor]:
    """Return rows of ids as `b length`, padded on a side, and the mask, True = real."""
    ids = torch.full((len(rows), length), pad)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    for number, row in enumerate(rows):
        start = length - len(row) if side == "left" else 0
        ids[number, start : start + len(row)] = torch.tensor(row, dtype=torch.long)
        mask[number, start : start + len(row)] = True
    return ids, mask


def unknown_words(tokenizer: PreTrainedTokenizerFast, prompt: str) -> list[str]:
    """Return the parts of a prompt that a tokenizer does not know, in order."""
    found = tokenizer(prompt, add_special_tokens=False, return_offsets_mapping=True)
    unknown = tokenizer.unk_token_id
    pairs = zip(found["input_ids"], found["offset_mapping"], strict=True)
    return [prompt[start:end] for token, (start, end) in pairs if token == unknown]
