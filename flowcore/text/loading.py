"""Text encoders from files: one call for every architecture, whichever networks it reads."""

from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Literal, TypeAlias

import torch

from ..assets import resolve
from ..conditioning import TextShape
from ..errors import CheckpointError, ConfigError
from ..hub import PREFIX, fetch, is_address, looks_like_address
from .encoder import NetworkTextEncoder, TextEncoder
from .files import is_tokenizer, read_text_files, read_tokenizer
from .pair import PairTextEncoder

Source: TypeAlias = str | Path
Precision: TypeAlias = torch.dtype | Literal["auto"] | None


def load_text_encoder(
    sources: Source | Sequence[Source],
    *,
    shape: TextShape | None = None,
    device: torch.device | str = "cpu",
    dtype: Precision = "auto",
    padding_side: str | None = None,
) -> TextEncoder:
    """Return the text encoder of files, folders, bundled names, or addresses on the hub.

    Nothing is looked up on the network but what an address `hub:...` asks for.

    Args:
        sources: one or several: a Hugging Face folder; a folder of diffusers with text_encoder* in it; a
            safetensors file, of which an all-in-one checkpoint may hold several encoders; a bundled name; a
            tokenizer.json, or its folder, for encoders that have none with them. A tokenizer is looked for
            here, in the file (tensor `tokenizer_json`), then beside it. `hub:OWNER/NAME[/FOLDER]` is
            downloaded with a progress bar, unless it was before.
        shape: what the model reads of a text, `Architecture.text_shape(config)`; None = any width, and 128
            tokens.
        device: where the weights go.
        dtype: of weights and computation; "auto" = float32 for Gemma-3, else the file's; None = the file's.
        padding_side: of a T5Gemma2; None = what its files say.
    Raises: CheckpointError or ConfigError on one line, naming the file.
    """
    given = [sources] if isinstance(sources, str | Path) else list(sources)
    paths = [path for source in given for path in _unfold(_locate(source))]
    tokenizers = dict(read_tokenizer(path) for path in paths if is_tokenizer(path))
    found = [files for path in paths if not is_tokenizer(path) for files in read_text_files(path, tokenizers)]
    names = ", ".join(str(source) for source in given)
    encoders = []
    for files in found:
        module = import_module(f".{files.kind.name}", __package__)
        told = replace(
            files,
            padding_side=padding_side or files.padding_side,
            device=device,
            dtype=files.kind.dtype if dtype == "auto" else dtype,
        )
        encoder: NetworkTextEncoder = module.from_files(told, shape)
        encoders.append(encoder.to(device))
    joined = _join(encoders, names)
    if shape is not None:
        _check_widths(joined, shape, names)
    return joined


def _locate(source: Source) -> Path:
    """Return the path of a source. Raises: CheckpointError with the remedy, if it is not here."""
    if is_address(source):
        return fetch(str(source))
    try:
        return resolve(source)
    except CheckpointError as err:
        if not looks_like_address(source):
            raise
        raise CheckpointError(f"{err}; to download it from the hub, write {PREFIX}{source}") from err


def _unfold(path: Path) -> list[Path]:
    """Return the folders of the text encoders of a diffusers folder, or the path itself."""
    return sorted(path.glob("text_encoder*")) or [path] if path.is_dir() else [path]


def _join(encoders: Sequence[NetworkTextEncoder], names: str) -> TextEncoder:
    """Return one encoder, or that of token states joined with that of the vector. Raises: ConfigError."""
    states = [encoder for encoder in encoders if encoder.kind != "clip"]
    vectors = [encoder for encoder in encoders if encoder.kind == "clip"]
    if len(states) != 1 or len(vectors) > 1:
        kinds = ", ".join(encoder.kind for encoder in encoders) or "none"
        raise ConfigError(
            "text encoders must be one for the tokens (t5, t5gemma2 or gemma3), with or without one clip, "
            f"got {kinds} in {names}"
        )
    return PairTextEncoder(states[0], vectors[0]) if vectors else states[0]


def _check_widths(encoder: TextEncoder, shape: TextShape, names: str) -> None:
    """Raises: ConfigError if the model cannot read what the encoder says."""
    if shape.width not in (None, encoder.width):
        raise ConfigError(
            f"the text encoder must give tokens of the model's width {shape.width}, got {encoder.width} "
            f"({names}); pass the encoder that the model was trained with"
        )
    if encoder.pooled_width is None:
        if shape.needs_pooled:
            raise ConfigError(
                f"the text encoder must come with a CLIP text model of width {shape.pooled} for the "
                f"pooled vector, got {names} alone; pass both"
            )
    elif encoder.pooled_width != shape.pooled:
        raise ConfigError(
            f"the pooled vector must have the model's width {shape.pooled}, got "
            f"{encoder.pooled_width} from {names}; pass another CLIP text model"
            + (", or none" if not shape.needs_pooled else "")
        )
