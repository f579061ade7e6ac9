"""Files of a Gemma-3 text encoder: Hugging Face folders, and one safetensors file that holds everything."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from ..assets import resolve
from ..errors import CheckpointError, ConfigError
from ..weights.atomic import write_tensors
from ..weights.checkpoint import read_tensors

TOKENIZER_TENSOR = "tokenizer_json"
SPECIAL_TOKENS = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>", "unk_token": "<unk>"}
PREFIXES = ("language_model.model.", "model.language_model.", "model.", "")
# The output layer (tied to the embedding, not used here) and the image half of the larger models.
_UNUSED = ("lm_head.", "language_model.lm_head.", "vision_tower.", "multi_modal_projector.")
_UNUSED_UNDER_MODEL = ("model.vision_tower.", "model.multi_modal_projector.")


@dataclass(frozen=True, slots=True, kw_only=True)
class TextFiles:
    """What a text encoder's files hold: name for messages, settings, weights (bare keys), tokenizer JSON."""

    source: str
    config: dict[str, Any]
    state: dict[str, Tensor]
    tokenizer_json: str

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """Return the tokenizer; CheckpointError if its JSON is not one."""
        return tokenizer_from_json(self.tokenizer_json, source=self.source)


def tokenizer_from_json(text: str, *, source: str) -> PreTrainedTokenizerFast:
    """Return the tokenizer of a tokenizer.json's text, with Gemma's names of the special tokens.

    Raises: CheckpointError if the text is no tokenizer, or lacks a special token.
    """
    try:
        backend = Tokenizer.from_str(text)
    except Exception as err:  # the library raises bare Exception
        raise CheckpointError(f"the tokenizer of {source} must be a tokenizer.json, got {err}") from err
    absent = [token for token in SPECIAL_TOKENS.values() if backend.token_to_id(token) is None]
    if absent:
        raise CheckpointError(
            f"the tokenizer of {source} must have the tokens of Gemma, got none for {absent}"
        )
    backend.no_truncation()
    backend.no_padding()
    return PreTrainedTokenizerFast(tokenizer_object=backend, **SPECIAL_TOKENS)


def read_text_files(path_or_name: str | Path) -> TextFiles:
    """Return settings, weights and tokenizer of a folder, a safetensors file, or a bundled name.

    Raises: CheckpointError or ConfigError, naming the file.
    """
    path = resolve(path_or_name)
    folder = path if path.is_dir() else path.parent
    single = path / "model.safetensors"
    tensors, metadata = read_tensors(single if path.is_dir() and single.is_file() else path)
    own = tensors.pop(TOKENIZER_TENSOR, None)
    state = _bare_keys(tensors, path.name)
    if own is not None:
        text = own.cpu().numpy().tobytes().decode("utf-8")
    else:
        text = _read_beside(folder, "tokenizer.json", path.name)
    config = metadata.get("flowcore.config") or _read_beside(folder, "config.json", path.name)
    return TextFiles(
        source=path.name,
        config=_text_config(config, path.name),
        state=state,
        tokenizer_json=text,
    )


def write_text_file(
    path: str | Path,
    state: Mapping[str, Tensor],
    *,
    config: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerFast,
    metadata: Mapping[str, str],
) -> None:
    """Write weights, settings and tokenizer to one safetensors file, replacing an earlier one in one step."""
    text = tokenizer.backend_tokenizer.to_str()
    packed = torch.frombuffer(bytearray(text.encode("utf-8")), dtype=torch.uint8)
    own = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "Gemma3TextModel",
        "flowcore.config": json.dumps(dict(config)),
    }
    write_tensors(path, {**state, TOKENIZER_TENSOR: packed}, {**metadata, **own})


def _read_beside(folder: Path, name: str, source: str) -> str:
    """Return the text of a file in the weights' folder."""
    path = folder / name
    if not path.is_file():
        raise CheckpointError(
            f"the text encoder {source} must come with {name}, got none in its folder; copy it there, "
            "or pass a file that FlowCore saved"
        )
    return path.read_text(encoding="utf-8")


def _text_config(text: str, source: str) -> dict[str, Any]:
    """Return the settings of the text half of a Gemma-3 model."""
    try:
        config = json.loads(text)
    except json.JSONDecodeError as err:
        raise CheckpointError(f"the config of {source} must be JSON, got {err}") from err
    kind = config.get("model_type") if isinstance(config, dict) else None
    if kind not in ("gemma3_text", "gemma3"):
        raise ConfigError(f"the model_type of {source} must be gemma3_text or gemma3, got {kind}")
    values: dict[str, Any] = config["text_config"] if kind == "gemma3" else config
    return {
        key: value for key, value in values.items() if key not in ("architectures", "transformers_version")
    }


def _bare_keys(tensors: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """Return the text model's tensors without their prefix, and without those that encoding does not use."""
    used = {name: t for name, t in tensors.items() if not name.startswith((*_UNUSED, *_UNUSED_UNDER_MODEL))}
    for prefix in PREFIXES:
        if f"{prefix}embed_tokens.weight" in used:
            return {name.removeprefix(prefix): tensor for name, tensor in used.items()}
    raise CheckpointError(
        f"{source} must hold a Gemma-3 text model (embed_tokens.weight), got {len(tensors)} tensors "
        f"without it ({', '.join(sorted(tensors)[:5])}); pass a text encoder"
    )
