"""Prompts of exo that lie in files of encoded samples: token ids, and the patches of pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from flowcore.conditioning import Conditioning
from flowcore.text.qwen3_vl import PromptReader
from training.data.cache import Encoded
from training.data.sample import DataError

_PICTURE = ("pixels", "grids")


def check_prompt(path: Path, told: Encoded, *, is_edit: bool) -> None:
    """Raises: DataError if a sample's text is no token ids `m 1`, or an edit has no picture (`n k`, `3`)."""
    ids = told["context"]
    if ids.is_floating_point() or ids.shape[1:] != (1,):
        raise DataError(
            f"{path} must hold context as token ids `m 1` for exo, got {ids.dtype} {tuple(ids.shape)}; "
            "export the batch of a run of exo"
        )
    found = {name for name in _PICTURE if name in told}
    if len(found) != (2 if is_edit else 0):
        raise DataError(
            f"{path} must hold {' and '.join(_PICTURE)} with source_latents and never without, got "
            f"{' and '.join(sorted(found)) or 'none'}; export the batch of a run of exo"
        )


def stored_prompts(rows: Sequence[Encoded], dropped: Sequence[bool], chat: PromptReader) -> Conditioning:
    """Conditions of samples with pictures or without, the empty prompt where theirs is dropped."""
    ids = [_empty_ids(row, chat) if drop else row["context"] for row, drop in zip(rows, dropped, strict=True)]
    mask = pad_sequence([torch.ones(len(row), dtype=torch.bool) for row in ids], batch_first=True)
    extras = {name: torch.stack([row[name] for row in rows]) for name in _PICTURE if name in rows[0]}
    return Conditioning(context=pad_sequence(ids, batch_first=True), context_mask=mask, extras=extras)


def _empty_ids(row: Encoded, chat: PromptReader) -> Tensor:
    """Token ids `m 1` of the empty prompt, with a picture of the sample's size if it has one."""
    picture = None
    if "grids" in row:
        picture = torch.zeros(1, 3, *(row["grids"][1:] * chat.patch).tolist())
    context = chat.read([""], picture).context
    assert context is not None
    return context[0]
