"""What a file of this project's kinds is, and a model's tensors under other names."""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from .assets import resolve
from .errors import CheckpointError, ConfigError, FlowCoreError
from .images import read_settings
from .models import Architecture
from .vae.config import infer_config, latent_grid
from .vae.keys import to_diffusers
from .vae.latent_spec import fitting_spaces, spec_from_metadata
from .weights.atomic import write_tensors
from .weights.checkpoint import build_model, needed_shapes, read_tensors
from .weights.lora import describe_lora
from .weights.recognition import Recognised, is_adapter, recognise
from .weights.strict import compare

BARE = "bare"
FOLDER_WEIGHTS = "diffusion_pytorch_model.safetensors"


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


def convert_file(
    source: str | Path, target: str | Path, layout: str | None = None, *, base: str | Path | None = None
) -> str:
    """Write a model's or a LoRA's tensors under the names of a layout; return one line on what was written.

    layout: "bare" for the architecture's own names, one of its prefixes, such as "diffusion_model", or one of
        its layouts that can be written, such as "diffusers"; that one makes a folder with a config.json of a
        target without ending. Of a LoRA diffusion_model, kohya, diffusers or native. None = the first named.
    base: of a LoRA: its model, where it is for none of a published size.
    Raises: CheckpointError if the source is neither; ConfigError for an unknown layout, with the known ones.
    """
    path = resolve(source)
    if Path(target).expanduser().resolve() == path.resolve():
        raise ConfigError(f"the output must be another file than the input, got {target} for both")
    tensors, metadata = read_tensors(path)
    if is_adapter(tensors.keys()) and not _is_model(tensors, metadata):
        from .weights.lora_conversion import convert_lora

        model = None if base is None else resolve(base)
        return convert_lora(
            tensors, metadata, Path(target).expanduser(), layout, source=path.name, base=model
        )
    if base is not None:
        raise ConfigError(f"--base must go with a LoRA, got {path.name}, which is none")
    loaded = build_model(tensors, metadata, source=path.name)
    layout = layout or BARE
    prefixes = layouts_of(loaded.architecture)
    exports = {found.name: found for found in loaded.architecture.layouts if found.export is not None}
    if layout not in prefixes and layout not in exports:
        raise ConfigError(f"the layout must be one of {', '.join((*prefixes, *exports))}, got {layout!r}")
    state = loaded.model.state_dict()
    file = Path(target).expanduser()
    if layout in prefixes:
        state = {prefixes[layout] + key: tensor for key, tensor in state.items()}
    else:
        chosen = exports[layout]
        assert chosen.export is not None  # as it is among the exports
        state = chosen.export(state, loaded.config)
        if chosen.folder_settings is not None and not file.suffix:
            settings = json.dumps(chosen.folder_settings(loaded.config), indent=2) + "\n"
            file.mkdir(parents=True, exist_ok=True)
            (file / "config.json").write_text(settings, encoding="utf-8")
            file = file / FOLDER_WEIGHTS
    stated = {
        "flowcore.arch": loaded.architecture.name,
        "flowcore.config": json.dumps(loaded.config.to_dict()),
    }
    write_tensors(file, state, {**loaded.metadata, **stated})
    return f"{target}: {loaded.architecture.name}, {len(state)} tensors, layout {layout}"


def _is_model(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bool:
    """Return whether the tensors are a model's, which may hold adapters."""
    try:
        recognise(tensors, metadata)
    except CheckpointError:
        return False
    return True


def layouts_of(architecture: Architecture) -> dict[str, str]:
    """Return the layouts that differ in a prefix alone, with the prefix of each."""
    return {prefix.rstrip(".") or BARE: prefix for prefix in architecture.prefixes}


def _describe_kind(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], path: Path) -> dict[str, Any]:
    """Return the kind of the file, and what there is to say of that kind."""
    try:
        found = recognise(tensors, metadata)
    except CheckpointError as err:
        part = _part(tensors.keys())
        if part is None:
            raise CheckpointError(f"{path}: {err}") from err
        if part == "vae":
            return {"kind": part, "latent_spaces": _latent_spaces(tensors, metadata, path.name)}
        return {"kind": part, **(describe_lora(tensors) if part == "lora" else {})}
    return {
        "kind": "model",
        "architecture": found.architecture.name,
        "version": found.version or None,
        "layout": found.layout.name if found.layout else found.prefix.rstrip(".") or BARE,
        "prefix": found.prefix,
        "others": len(found.others),
        **_describe_model(found),
    }


def _describe_model(found: Recognised) -> dict[str, Any]:
    """Return a model's sizes, and which of its tensors are missing, too many, or of another shape."""
    architecture = found.architecture
    try:
        config = architecture.infer_config(found.state, found.metadata)
    except FlowCoreError as err:  # the file is what it is: say so, and what stands in the way
        return {"config": None, "problem": str(err)}
    needed = needed_shapes(architecture.model(config, device="meta"), found.state)
    differences = compare(needed, found.state)
    return {
        "config": config.to_dict(),
        "presets": [name for name, preset in architecture.presets.items() if preset == config],
        "missing": differences.missing,
        "unexpected": differences.unexpected,
        "wrong_shape": differences.misshapen,
    }


def _part(keys: Collection[str]) -> str | None:
    """Return which other part of a pipeline the names are, or None."""
    if "encoder.conv_in.weight" in keys and "decoder.conv_in.weight" in keys:
        return "vae"
    if any(key.endswith("embed_tokens.weight") for key in keys):
        return "text encoder"
    return "lora" if is_adapter(keys) else None


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
