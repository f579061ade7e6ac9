"""Files of Exo: everything of its own in one safetensors file, the trunk beside it by reference.

A reference is the folder or the repository of a Qwen3-VL checkpoint, with a fingerprint of its weights, for
checkpoints of one size have the same shapes.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from ..hub import find_folder
from ..lazy import LazyTensors, renamed
from ..models.exo import Exo
from ..models.exo.lora import describe_changes
from ..models.exo.trunk import build_trunk
from ..models.exo.trunk_config import TrunkConfig, trunk_config
from ..ops import TORCH_OPS, Ops
from .checkpoint import LoadedModel, load_model, read_tensors, save_model
from .strict import assign_strict

FORMAT = "exo/1"
MERGED = "exo.merged"
"""Metadata of a trunk with changes added for good, which its fingerprint does not show: their hash."""
_HEAD = "lm_head."
_FINGERPRINTED = ("language_model.norm.weight", "language_model.layers.0.input_layernorm.weight")


def load_exo(
    path: str | Path,
    *,
    trunk: str | Path | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    ops: Ops = TORCH_OPS,
    may_download: bool = False,
    any_trunk: bool = False,
) -> LoadedModel:
    """Return the model of an Exo file with its trunk, in evaluation mode.

    Args:
        path: the file.
        trunk: folder or repository of the trunk; None = the one that the file names.
        device: where the weights go.
        dtype: of the weights; None = as stored.
        ops: of the layers that are not the trunk's.
        may_download: whether a repository that is not in the cache may be fetched from the Hugging Face hub.
        any_trunk: whether a trunk with other weights of the same shapes will do.
    Raises: CheckpointError that names the file and what is wrong.
    """
    loaded = load_model(path, device=device, dtype=dtype, ops=ops)
    if not isinstance(loaded.model, Exo):
        raise CheckpointError(f"{path} must be an Exo file, got a {loaded.architecture.name} model")
    if not loaded.model.config.embeds_trunk:
        folder = trunk_folder(loaded, path, trunk=trunk, may_download=may_download)
        network = load_trunk(folder, device=device, dtype=dtype)
        attach_trunk(loaded, path, network, source=str(folder), any_trunk=any_trunk)
    return loaded


def trunk_folder(
    loaded: LoadedModel, path: str | Path, *, trunk: str | Path | None = None, may_download: bool = False
) -> Path:
    """Return the folder of the trunk of a model whose file does not hold it; arguments as in `load_exo`.

    Raises: CheckpointError if it is nowhere.
    """
    reference = _reference(loaded.metadata, path)
    source = trunk or reference.get("repo")
    if source is None:
        raise CheckpointError(f"{path} must name its trunk or be given one, got neither; pass trunk=FOLDER")
    revision = None if trunk else reference.get("revision")
    return find_folder(source, revision=revision, may_download=may_download)


def attach_trunk(
    loaded: LoadedModel, path: str | Path, network: nn.Module, *, source: str, any_trunk: bool = False
) -> None:
    """Give the model of an Exo file its trunk; source: the folder that it is from.

    Raises: CheckpointError if the file was made for another one.
    """
    reference = _reference(loaded.metadata, path)
    found, stated = fingerprint(network), reference.get("fingerprint")
    if stated not in (None, found) and not any_trunk:
        made_for = reference.get("repo", "another trunk")
        raise CheckpointError(
            f"the trunk of {path} must have the fingerprint {stated[:12]} ({made_for}), got {found[:12]} in "
            f"{source}; the file was made for another trunk, pass that one"
        )
    needed, held = (str(place.get("merged"))[:12] for place in (reference, merged_mark(source)))
    if needed != held and not any_trunk:
        raise CheckpointError(
            f"the trunk of {path} must have the merged changes {needed}, got {held} in {source}; the file "
            "was made for the trunk before or after a merge, pass that one"
        )
    cast("Exo", loaded.model).attach(network.eval())


def save_exo(
    path: str | Path, model: Exo, *, trunk: str | None = None, metadata: Mapping[str, str] | None = None
) -> None:
    """Write what is Exo's own to a file; trunk: folder or repository of an attached trunk.

    Raises: CheckpointError if the file cannot be written.
    """
    own = {"exo.format": FORMAT, "exo.trunk": json.dumps(_describe_trunk(model, trunk))}
    config = model.config
    if config.lora_rank:
        own["exo.lora"] = json.dumps(describe_changes(config))
    save_model(
        path, model.own_state(), architecture="exo", config=config, metadata={**own, **(metadata or {})}
    )


def load_trunk(
    folder: str | Path, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> nn.Module:
    """Return the Qwen3VLModel of a checkpoint's folder. The output layer stays in its file.

    Raises: CheckpointError if the folder is another model's, or incomplete.
    """
    settings = Path(folder) / "config.json"
    if not settings.is_file():
        raise CheckpointError(
            f"the trunk {folder} must be a folder with config.json, got none; give a Qwen3-VL checkpoint"
        )
    try:
        values = json.loads(settings.read_text(encoding="utf-8"))
    except json.JSONDecodeError as err:
        raise CheckpointError(f"{settings} must be JSON, got an error at {err.pos}") from err
    config = trunk_config(values, source=str(folder))
    tensors, _ = read_tensors(folder)
    return trunk_from_tensors(config, tensors, source=str(folder), device=device, dtype=dtype)


def trunk_from_tensors(
    config: TrunkConfig,
    tensors: Mapping[str, Tensor],
    *,
    source: str,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """Return the Qwen3VLModel of settings and of tensors under the published names.

    Raises: CheckpointError if the tensors are not exactly such a model's, with or without its output layer.
    """
    network = build_trunk(config, device="meta")
    assign_strict(network, bare_trunk(tensors), source=source, what="Qwen3-VL", device=device, dtype=dtype)
    return network.to(device).eval()


def bare_trunk(tensors: Mapping[str, Tensor]) -> LazyTensors:
    """Return a Qwen3-VL's tensors without the output layer and without `model.` before their names."""
    return renamed(
        tensors, {name.removeprefix("model."): name for name in tensors if not name.startswith(_HEAD)}
    )


def fingerprint(trunk: nn.Module) -> str:
    """Return the hash that tells trunks of equal shapes apart: sha256 of two norms in bfloat16."""
    return _fingerprint({name: trunk.get_parameter(name) for name in _FINGERPRINTED})


def trunk_reference(name: str | None, folder: Path | None) -> dict[str, Any]:
    """Return what a file says of its trunk, named so and lying in the folder; None = the file holds it."""
    if folder is None:
        return {"kind": "embedded"}
    found = _fingerprint(bare_trunk(read_tensors(folder)[0]))
    reference = {"kind": "reference", "repo": name, "revision": None, "fingerprint": found}
    return {**reference, **merged_mark(folder)}


def merged_mark(folder: str | Path) -> dict[str, str]:
    """Return what a file says of the merged changes of a folder's trunk; nothing where there are none."""
    metadata = read_tensors(folder)[1]
    return {"merged": metadata[MERGED]} if MERGED in metadata else {}


def _fingerprint(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in _FINGERPRINTED:
        weight = tensors[name].detach().to("cpu", torch.bfloat16)
        digest.update(weight.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _describe_trunk(model: Exo, trunk: str | None) -> dict[str, Any]:
    """Return what a file says of its trunk."""
    if model.config.embeds_trunk:
        return {"kind": "embedded"}
    found = None if model.trunk is None else fingerprint(model.trunk)
    reference = {"kind": "reference", "repo": trunk, "revision": None, "fingerprint": found}
    return {**reference, **(merged_mark(trunk) if trunk and Path(trunk).is_dir() else {})}


def _reference(metadata: Mapping[str, str], path: str | Path) -> dict[str, Any]:
    """Return what the file says of its trunk."""
    try:
        reference = json.loads(metadata.get("exo.trunk", "{}"))
    except json.JSONDecodeError as err:
        raise CheckpointError(f"metadata exo.trunk of {path} must be JSON, got {err}") from err
    if not isinstance(reference, dict):
        raise CheckpointError(f"metadata exo.trunk of {path} must be a JSON object, got {reference!r}")
    return cast("dict[str, Any]", reference)
