"""Files of text encoders: Hugging Face folders, and safetensors files with or without their companions."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPTokenizerFast, PreTrainedTokenizerFast

from ..assets import resolve
from ..errors import CheckpointError, ConfigError
from ..layers.scaled import unscaled
from ..lazy import LazyTensors, renamed
from ..weights.atomic import write_tensors
from ..weights.checkpoint import read_tensors
from ..weights.strict import assign_strict
from .kinds import Kind, find_parts
from .tokens import SPECIAL_TOKENS, tokenizer_from_json

TOKENIZER_TENSOR = "tokenizer_json"
_EIGHT_BITS = (torch.float8_e4m3fn, torch.float8_e5m2)
_NO_SETTINGS = ("architectures", "transformers_version")


@dataclass(frozen=True, slots=True, kw_only=True)
class TextFiles:
    """What a text encoder's files hold: name for messages, kind, settings, weights (bare keys), tokenizer.

    settings: as config.json or the file's metadata states them; None = a kind whose tensors tell them.
    padding_side: of the tokenizer, where the files state it.
    device, dtype: where the weights go, and in which precision; None = as they are.
    """

    source: str
    kind: Kind
    settings: dict[str, Any] | None
    state: Mapping[str, Tensor]
    tokenizer_json: str
    padding_side: str | None = None
    device: torch.device | str = "cpu"
    dtype: torch.dtype | None = None

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """Return the tokenizer; CheckpointError if its JSON is not one of the kind."""
        return tokenizer_from_json(self.tokenizer_json, source=self.source, family=self.kind.family)

    def assign(self, network: nn.Module, state: Mapping[str, Tensor], *, what: str) -> None:
        """Give a network that was built on the meta device its weights. Raises: CheckpointError."""
        assign_strict(network, state, source=self.source, what=what, device=self.device, dtype=self.dtype)


def is_tokenizer(path: Path) -> bool:
    """Return whether a path is a tokenizer without weights: a JSON file, or a folder without other files."""
    return path.suffix == ".json" if path.is_file() else not any(path.glob("*.safetensors*"))


def read_tokenizer(path: Path) -> tuple[str, str]:
    """Return the family and the JSON of a tokenizer's file or folder. Raises: CheckpointError."""
    text = _tokenizer_in(path)
    family = None if text is None else _family(text)
    if text is None or family is None:
        raise CheckpointError(
            f"{path} must be a tokenizer.json, or a folder with one or with weights, got something else; "
            f"known are tokenizers of {', '.join(SPECIAL_TOKENS)}"
        )
    return family, text


def read_text_files(
    path_or_name: str | Path, tokenizers: Mapping[str, str] = MappingProxyType({})
) -> list[TextFiles]:
    """Return every text encoder of a folder, a safetensors file, or a bundled name.

    tokenizers: family -> JSON, which goes before what lies in the file or beside it.
    Raises: CheckpointError or ConfigError, naming the file.
    """
    path = resolve(path_or_name)
    single = path / "model.safetensors"
    weights = single if path.is_dir() and single.is_file() else path
    if weights.suffix in (".bin", ".pt", ".pth", ".ckpt"):
        raise CheckpointError(f"{path.name} must be a safetensors file, got a pickle; convert it")
    tensors, metadata = read_tensors(weights)
    networks = renamed(tensors, {name: name for name in tensors if name != TOKENIZER_TENSOR})
    own = tensors.get(TOKENIZER_TENSOR)
    packed = None if own is None else own.numpy().tobytes().decode("utf-8")
    return [
        TextFiles(
            source=path.name,
            kind=kind,
            tokenizer_json=tokenizers.get(kind.family) or packed or _tokenizer_beside(path),
            settings=_settings(kind, metadata, path),
            state=_without_8_bits(state),
            padding_side=metadata.get("flowcore.padding_side") or _stated_side(path),
        )
        for kind, state in find_parts(networks, path.name)
    ]


def write_text_file(
    path: str | Path,
    state: Mapping[str, Tensor],
    *,
    config: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerFast,
    metadata: Mapping[str, str],
    architecture: str = "Gemma3TextModel",
) -> None:
    """Write weights, settings and tokenizer to one safetensors file, replacing an earlier one in one step."""
    text = tokenizer.backend_tokenizer.to_str()
    packed = torch.frombuffer(bytearray(text.encode("utf-8")), dtype=torch.uint8)
    own = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": architecture,
        "flowcore.config": json.dumps(dict(config)),
    }
    write_tensors(path, {**state, TOKENIZER_TENSOR: packed}, {**metadata, **own})


def plain_settings(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config.json's settings without what says who wrote it."""
    return {key: value for key, value in values.items() if key not in _NO_SETTINGS}


def _without_8_bits(state: Mapping[str, Tensor]) -> LazyTensors:
    """Return weights that can be computed with: those of 8 bits in bfloat16, times their scale if any."""
    true = unscaled(state)
    return LazyTensors(true, {name: partial(_computable, name) for name in true})


def _computable(name: str, tensors: Mapping[str, Tensor]) -> Tensor:
    tensor = tensors[name]
    return tensor.to(torch.bfloat16) if tensor.dtype in _EIGHT_BITS else tensor


def _settings(kind: Kind, metadata: Mapping[str, str], path: Path) -> dict[str, Any] | None:
    """Return the settings that a file states, or those in its folder if they are of its kind."""
    folder = path if path.is_dir() else path.parent
    beside = folder / "config.json"
    text = metadata.get("flowcore.config")
    if text is None and beside.is_file():
        text = beside.read_text(encoding="utf-8")
    values = {} if text is None else _json(text, path.name)
    stated = values.get("model_type")
    if stated in kind.model_types:
        return plain_settings(values)
    if kind.name in ("t5", "clip"):
        return None
    if text is None:
        raise CheckpointError(_absent("config.json", path.name))
    raise ConfigError(
        f"the model_type of {path.name} must be one of {', '.join(kind.model_types)}, got {stated}"
    )


def _tokenizer_beside(path: Path) -> str:
    """Return the JSON of the tokenizer that lies with the weights."""
    folder = path if path.is_dir() else path.parent
    places = [folder / f"{path.stem}.tokenizer.json", folder]
    if folder.name.startswith("text_encoder"):  # as diffusers lays them out
        places.append(folder.with_name(folder.name.replace("text_encoder", "tokenizer")))
    found = next((text for text in map(_tokenizer_in, places) if text is not None), None)
    if found is None:
        raise CheckpointError(_absent("tokenizer.json", path.name))
    return found


def _absent(name: str, source: str) -> str:
    return (
        f"the text encoder {source} must come with {name}, got none in its folder; copy it there"
        + (", or name it after the encoder" if name == "tokenizer.json" else "")
        + ", or pass a file that FlowCore saved"
    )


def _tokenizer_in(place: Path) -> str | None:
    """Return the JSON of a tokenizer's file or folder, or None if there is none."""
    file = place / "tokenizer.json" if place.is_dir() else place
    if file.is_file():
        return file.read_text(encoding="utf-8")
    if all((place / name).is_file() for name in ("vocab.json", "merges.txt")):
        made: Any = CLIPTokenizerFast.from_pretrained(place, local_files_only=True)
        return str(made.backend_tokenizer.to_str())
    return None


def _family(text: str) -> str | None:
    """Return whose tokenizer a JSON text is, by its special tokens."""
    marks = {"CLIP": '"<|startoftext|>"', "Gemma": '"<bos>"', "T5": '"</s>"'}
    return next((family for family, mark in marks.items() if mark in text), None)


def _stated_side(path: Path) -> str | None:
    """Return the padding side that a tokenizer_config.json beside the weights states."""
    file = (path if path.is_dir() else path.parent) / "tokenizer_config.json"
    if not file.is_file():
        return None
    side: str | None = _json(file.read_text(encoding="utf-8"), path.name).get("padding_side")
    return side


def _json(text: str, source: str) -> dict[str, Any]:
    try:
        values = json.loads(text)
    except json.JSONDecodeError as err:
        raise CheckpointError(f"the settings of {source} must be JSON, got {err}") from err
    if not isinstance(values, dict):
        raise CheckpointError(f"the settings of {source} must be a JSON object, got {type(values).__name__}")
    return values
