"""The trunk with an Exo file's low-rank changes added for good, and the file without them."""

import hashlib
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..assets import resolve
from ..errors import CheckpointError
from ..models.exo import Exo
from ..models.exo.lora import LowRank, merged
from ..weights.atomic import write_tensors
from ..weights.checkpoint import LoadedModel, load_model, read_tensors
from ..weights.exo import MERGED, attach_trunk, load_trunk, save_exo, trunk_folder

FILE, TRUNK = "exo.safetensors", "model.safetensors"
_WRITTEN = ("exo.lora", "exo.trunk", "exo.format", "flowcore.config")
"""Metadata that is made anew."""
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".index.json")


@torch.no_grad()
def merge_file(
    source: str | Path, target: str | Path, *, trunk: str | Path | None = None, may_download: bool = False
) -> str:
    """Write a folder with the changed trunk and an Exo file for it; return one line on what was written.

    Of a file that holds its trunk, the folder has the Exo file alone. dtypes are kept; sums are float32.
    trunk: folder or repository; None = what the file names.
    Raises: CheckpointError if the file has no changes, its trunk is another one, or the folder is not empty.
    """
    path, folder = resolve(source), Path(target).expanduser()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(
            f"the output {folder} must be a new or an empty folder, got one with files in it"
        )
    loaded = load_model(path)
    model = loaded.model
    if not isinstance(model, Exo):
        raise CheckpointError(f"{path} must be an Exo file, got a {loaded.architecture.name} model")
    if model.lora is None:
        raise CheckpointError(f"{path} must hold low-rank changes of its trunk (lora.), got none to merge")
    if model.config.embeds_trunk:
        _merge_inside(model)
    else:
        origin = trunk_folder(loaded, path, trunk=trunk, may_download=may_download)
        attach_trunk(loaded, path, load_trunk(origin), source=str(origin))
        _write_trunk(model, origin, folder)
    count = len(_changes(model))
    _write_rest(loaded, model, folder)
    return f"{folder}: {count} projections of the trunk merged, {FILE} without lora"


def _changes(model: Exo) -> dict[str, LowRank]:
    """Return the changes by the bare names of the weights that they change."""
    assert model.lora is not None
    return {
        f"language_model.layers.{layer}.self_attn.{name}.weight": change
        for layer in range(model.config.num_layers)
        for name, change in model.lora.of_layer(layer).items()
    }


def _merge_inside(model: Exo) -> None:
    """Change the weights of a trunk that lies in the model: new tensors, for files are mapped."""
    trunk: Any = model.trunk
    for name, change in _changes(model).items():
        weight = trunk.get_parameter(name)
        weight.data = merged(weight, change)


def _write_trunk(model: Exo, origin: Path, folder: Path) -> None:
    """Write the trunk's tensors under their published names, and copy what lies with them."""
    tensors, metadata = read_tensors(origin)
    changes = _changes(model)

    def changed(name: str, tensor: Tensor) -> Tensor:
        change = changes.get(name.removeprefix("model."))
        return tensor if change is None else merged(tensor, change)

    folder.mkdir(parents=True, exist_ok=True)
    kept = {key: value for key, value in metadata.items() if key == "format"}
    kept[MERGED] = _hash(changes, metadata.get(MERGED, ""))
    write_tensors(folder / TRUNK, {name: changed(name, t) for name, t in tensors.items()}, kept)
    for file in origin.iterdir():
        if file.is_file() and not file.name.endswith(_WEIGHTS):
            shutil.copyfile(file, folder / file.name)


def _hash(changes: Mapping[str, LowRank], earlier: str) -> str:
    """Return what tells merged changes from others; earlier: that of those in the trunk before."""
    digest = hashlib.sha256(earlier.encode())
    for change in changes.values():
        for layer in (change.lora_A, change.lora_B):
            digest.update((layer.weight.float().cpu() * change.scale).numpy().tobytes())
    return digest.hexdigest()


def _write_rest(loaded: LoadedModel, model: Exo, folder: Path) -> None:
    """Write the Exo file without changes."""
    folder.mkdir(parents=True, exist_ok=True)
    model.lora = None
    model.config = replace(model.config, lora_rank=0)
    metadata = {key: value for key, value in loaded.metadata.items() if key not in _WRITTEN}
    trunk = None if model.config.embeds_trunk else str(folder)
    save_exo(folder / FILE, model, trunk=trunk, metadata=metadata)
