"""What a file of this project's kinds is, and a model's tensors under other names."""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from .assets import resolve
from .errors import CheckpointError, ConfigError
from .images import read_settings
from .models import Architecture, detect, find_layout
from .vae.config import infer_config, latent_grid
from .vae.keys import to_diffusers
from .vae.latent_spec import fitting_spaces, spec_from_metadata
from .weights.atomic import write_tensors
from .weights.checkpoint import build_model, read_tensors

BARE = "bare"


def describe_file(path_or_name: str | Path) -> dict[str, Any]:
    """Return what a weight file holds, or the settings of a picture, as JSON-like values.

    Raises: CheckpointError or ConfigError if the file is unreadable or of no known kind.
    """
    path = resolve(path_or_name)
    if path.suffix.lower() == ".png":
        return {"file": str(path), "kind": "picture", "settings": read_settings(path)}
    tensors, metadata = read_tensors(path)
    return {
        "file": str(path),
        **_describe_kind(tensors, metadata, path),
        "tensors": len(tensors),
        "parameters": sum(t.numel() for t in tensors.values() if t.is_floating_point()),
        "dtypes": sorted({str(t.dtype).removeprefix("torch.") for t in tensors.values()}),
        "metadata": {key: _readable(value) for key, value in sorted(metadata.items())},
    }


def convert_file(source: str | Path, target: str | Path, layout: str) -> str:
    """Write a model's tensors under the names of a layout; return one line on what was written.

    layout: "bare" for the architecture's own names, one of its prefixes, such as "diffusion_model", or one of
        its layouts that can be written, such as "diffusers".
    Raises: CheckpointError if the source is no model; ConfigError for an unknown layout, with the known ones.
    """
    path = resolve(source)
    if Path(target).expanduser().resolve() == path.resolve():
        raise ConfigError(f"the output must be another file than the input, got {target} for both")
    tensors, metadata = read_tensors(path)
    loaded = build_model(tensors, metadata, source=path.name)
    prefixes = layouts_of(loaded.architecture)
    exports = {found.name: found.export for found in loaded.architecture.layouts if found.export is not None}
    if layout not in prefixes and layout not in exports:
        raise ConfigError(f"the layout must be one of {', '.join((*prefixes, *exports))}, got {layout!r}")
    state = loaded.model.state_dict()
    if layout in exports:
        state = exports[layout](state, loaded.config)
    else:
        state = {prefixes[layout] + key: tensor for key, tensor in state.items()}
    stated = {
        "flowcore.arch": loaded.architecture.name,
        "flowcore.config": json.dumps(loaded.config.to_dict()),
    }
    write_tensors(target, state, {**loaded.metadata, **stated})
    return f"{target}: {loaded.architecture.name}, {len(state)} tensors, layout {layout}"


def layouts_of(architecture: Architecture) -> dict[str, str]:
    """Return the layouts that differ in a prefix alone, with the prefix of each."""
    return {prefix.rstrip(".") or BARE: prefix for prefix in architecture.prefixes}


def _describe_kind(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], path: Path) -> dict[str, Any]:
    """Return kind, architecture, layout and configuration."""
    try:
        architecture, prefix = detect(tensors.keys())
    except CheckpointError as err:
        part = _part(tensors.keys())
        if part is None:
            raise CheckpointError(f"{path}: {err}") from err
        if part == "vae":
            return {"kind": part, "latent_spaces": _latent_spaces(tensors, metadata, path.name)}
        return {"kind": part}
    bare = {key[len(prefix) :]: t for key, t in tensors.items() if key.startswith(prefix)}
    found = find_layout(architecture, bare.keys())
    state = found.convert(bare) if found else bare
    return {
        "kind": "model",
        "architecture": architecture.name,
        "layout": found.name if found else prefix.rstrip(".") or BARE,
        "config": architecture.infer_config(state, metadata).to_dict(),
    }


def _part(keys: Collection[str]) -> str | None:
    """Return which other part of a pipeline the names are, or None."""
    if "encoder.conv_in.weight" in keys and "decoder.conv_in.weight" in keys:
        return "vae"
    if any(key.endswith("embed_tokens.weight") for key in keys):
        return "text encoder"
    return "lora" if any(".lora_" in key for key in keys) else None


def _latent_spaces(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], source: str) -> list[str]:
    """Return the space that an autoencoder's file states, else all that its tensors fit."""
    stated = spec_from_metadata(metadata, source=source)
    if stated is not None:
        return [stated.name]
    return list(fitting_spaces(latent_grid(infer_config(to_diffusers(tensors), source=source)), tensors))


def _readable(value: str) -> Any:  # noqa: ANN401 - whatever JSON the metadata holds
    """Return the value that a metadata text stands for."""
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value
