"""Samples as text: JSON, or rows of numbers."""

import json
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError
from .codecs import Codec, Symbols

_DIGITS = 6


def samples_from_text(text: str, codec: Codec) -> Tensor:
    """Return samples `b ...` of one sample or of a list of them, as JSON or as a row of numbers a line.

    Raises: ConfigError if the text holds anything else, or numbers in another shape.
    """
    try:
        values = torch.tensor(_parse(text), dtype=torch.float32)
    except (TypeError, ValueError) as err:
        raise ConfigError(
            f"numbers must be a list in JSON, or as many numbers on every line, got {text.strip()[:40]!r}"
        ) from err
    if tuple(values.shape) == codec.shape:
        values = values[None]
    if tuple(values.shape[1:]) != codec.shape or not bool(torch.isfinite(values).all()):
        expected = " x ".join(map(str, codec.shape))
        raise ConfigError(
            f"numbers of this {codec.kind} space must be finite and {expected}, or several of these, got "
            f"{' x '.join(map(str, values.shape)) or 'one'}"
        )
    return values


def samples_to_text(samples: Tensor, codec: Codec) -> str:
    """Return samples `b ...` as JSON that `samples_from_text` reads, with six digits behind the point."""
    values = samples.detach().cpu()
    if isinstance(codec, Symbols):
        return json.dumps(values.long().tolist())
    return json.dumps(_rounded(values.double().tolist()))


def _parse(text: str) -> Any:  # noqa: ANN401 - lists of any depth
    """Return nested lists of numbers. Raises: ValueError."""
    if text.lstrip().startswith("["):
        return json.loads(text)
    rows = [line.replace(",", " ").replace(";", " ").split() for line in text.splitlines() if line.strip()]
    if not rows:
        raise ValueError("no number")
    return [[float(word) for word in row] for row in rows]


def _rounded(values: Any) -> Any:  # noqa: ANN401 - lists of any depth
    return [_rounded(value) for value in values] if isinstance(values, list) else round(values, _DIGITS)
