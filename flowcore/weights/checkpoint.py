"""Weight files of models: read without copying, made into a model, written whole or not at all."""

import datetime
import json
import pickle
import zipfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..errors import CheckpointError, FlowCoreError
from ..lazy import outline, renamed
from ..models import Architecture, ModelConfig, find_architecture
from ..ops import TORCH_OPS, Ops
from .atomic import write_tensors
from .placement import placed
from .recognition import recognise
from .stored import MappedFile, Reader, StoredTensors
from .strict import check_strict

METADATA_TENSOR = "flowcore_metadata"
"""Last part of the name of a uint8 tensor that holds metadata as JSON, for hosts that drop a file's own."""

_PICKLED = (".pt", ".pth", ".ckpt", ".bin")
_CONTAINERS = ("ema_state_dict", "model_state_dict", "state_dict", "model", "module", "ema", "shadow")
_INDEX = ".safetensors.index.json"
_STEMS = ("model", "diffusion_pytorch_model", "pytorch_model", "weights", "checkpoint")
"""Names of a folder's main weights, the first that is there."""
_SETTINGS = ("config.json", "model_config.json")


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """A model with its weights, what it is, and a line on what was loaded."""

    model: nn.Module
    architecture: Architecture
    config: Any
    metadata: Mapping[str, str]
    report: str


def read_tensors(path: str | Path) -> tuple[Mapping[str, Tensor], dict[str, str]]:
    """Return the tensors and string metadata of a weight file, on the CPU.

    A tensor is read when it is looked up, and takes memory as long as it is used: files are mapped, but for
    those of torch before 1.6. `path` is a safetensors file, the index of several, a torch file (.pt, .pth,
    .ckpt, .bin), of which only the tensors in plain containers are read (no code is run), or a folder with
    one of these, whose config.json becomes metadata.
    Raises: CheckpointError that names the file, and the tensor where it is one.
    """
    contents = _read(Path(path))
    return contents.tensors, contents.metadata


def load_model(
    path: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    ops: Ops = TORCH_OPS,
) -> LoadedModel:
    """Return the model of a file, in evaluation mode; architecture and sizes are read from its tensors.

    dtype: of the weights, but for those that the model keeps in float32; None = as stored, and then nothing
    is copied on the device "cpu".
    Raises: CheckpointError that names the file, what is wrong, and the first five keys concerned.
    """
    contents = _read(Path(path))
    try:
        return build_model(
            contents.tensors,
            contents.metadata,
            source=str(path),
            device=device,
            dtype=dtype,
            ops=ops,
        )
    except CheckpointError as err:
        raise err if str(path) in str(err) else CheckpointError(f"{path}: {err}") from err
    except FlowCoreError as err:
        raise CheckpointError(f"{path}: {err}") from err


def build_model(
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    *,
    source: str,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    ops: Ops = TORCH_OPS,
) -> LoadedModel:
    """Return the model of tensors already read, as `load_model`.

    source: where the tensors are from, for messages.
    Raises: as `load_model`.
    """
    found = recognise(tensors, metadata)
    architecture, state = found.architecture, found.state
    config = architecture.infer_config(state, found.metadata)
    model = architecture.model(config, ops=ops, device="meta", dtype=dtype)
    expected, found_tensors = needed_shapes(model, state), outline(state)
    check_strict(expected, found_tensors, source=source, what=f"{architecture.name} model")
    _check_floating(expected, found_tensors, source)
    built = {} if dtype is None else model.state_dict()
    dtypes = {name: tensor.dtype for name, tensor in built.items()}
    model.load_state_dict(placed(state, dtypes, device), strict=True, assign=True)
    model.to(device).eval()
    return LoadedModel(
        model=model,
        architecture=architecture,
        config=config,
        metadata=found.metadata,
        report=f"{source}: {found.describe()}",
    )


def needed_shapes(model: nn.Module, names: Collection[str]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a model's tensors, but for buffers that the names lack: it derives them."""
    buffers = {name for name, _ in model.named_buffers()}
    return {
        name: tuple(tensor.shape)
        for name, tensor in model.state_dict().items()
        if name in names or name not in buffers
    }


def _check_floating(names: Collection[str], state: Mapping[str, Tensor], source: str) -> None:
    """Refuse weights that are whole numbers. Raises: CheckpointError."""
    whole = [name for name in names if name in state and not state[name].is_floating_point()]
    if whole:
        more = f" and {len(whole) - 1} more" if len(whole) > 1 else ""
        raise CheckpointError(
            f"weights in {source} must be floating-point numbers, got {state[whole[0]].dtype} for {whole[0]}"
            f"{more}; use the file before quantisation"
        )


def save_model(
    path: str | Path,
    state_dict: Mapping[str, Tensor],
    *,
    architecture: Architecture | str,
    config: ModelConfig,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a model's tensors and description to a safetensors file, replacing an earlier one in one step.

    metadata: further entries; they win over the standard `modelspec.*` and `flowcore.*` ones.
    Raises: CheckpointError if the file cannot be written.
    """
    row = find_architecture(architecture) if isinstance(architecture, str) else architecture
    standard = {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"flowcore/{row.name}",
        "modelspec.title": Path(path).stem,
        "modelspec.date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "flowcore.arch": row.name,
        "flowcore.config": json.dumps(config.to_dict()),
    }
    write_tensors(path, state_dict, {**standard, **(metadata or {})})


@dataclass(frozen=True, slots=True, kw_only=True)
class _Contents:
    """Tensors and metadata of a file."""

    tensors: Mapping[str, Tensor]
    metadata: dict[str, str]


def _read(path: Path) -> _Contents:
    if path.is_dir():
        contents = _read_folder(path)
    elif not path.is_file():
        raise CheckpointError(f"{path} must be a weight file or a folder with one, got nothing there")
    elif path.name.endswith(_INDEX):
        contents = _read_shards(path)
    elif path.suffix in _PICKLED:
        contents = _read_pickled(path)
    else:
        contents = _read_safetensors(path)
    tensors, metadata = contents.tensors, dict(contents.metadata)
    notes = [name for name in tensors if name.rsplit(".", 1)[-1] == METADATA_TENSOR]
    for name in notes:
        metadata = {**_tensor_to_metadata(path, name, tensors[name]), **metadata}
    own = renamed(tensors, {name: name for name in tensors if name not in notes}) if notes else tensors
    if not own:
        raise CheckpointError(f"{path} must hold tensors, got none")
    return _Contents(tensors=own, metadata=metadata)


def _read_safetensors(path: Path) -> _Contents:
    files, metadata = _map_safetensors(path)
    return _Contents(tensors=StoredTensors(files), metadata=metadata)


def _map_safetensors(path: Path) -> tuple[dict[str, MappedFile], dict[str, str]]:
    """Return the file of each tensor in it, and the metadata. Raises: CheckpointError."""
    try:
        with safe_open(path, framework="pt") as file:
            names, metadata = list(file.keys()), dict(file.metadata() or {})
        return dict.fromkeys(names, MappedFile(path, _safetensors_reader)), metadata
    except (SafetensorError, OSError, ValueError) as err:
        raise CheckpointError(
            f"{path} must be a complete safetensors file, got {_fault(path, err)}; download or copy it again"
        ) from err


def _safetensors_reader(path: Path) -> Reader:
    reader: Reader = safe_open(path, framework="pt").get_tensor
    return reader


def _fault(path: Path, err: Exception) -> str:
    """Return what a file that cannot be read seems to be."""
    with path.open("rb") as file:
        start = file.read(64)
    if start.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer in its place"
    if start.startswith(b"PK"):
        return f"a zip archive (a torch file? then its name must end in one of {', '.join(_PICKLED)})"
    if start.lstrip()[:1] == b"<":
        return "a web page"
    return f"{path.stat().st_size} bytes that do not fit ({err})"


def _read_folder(path: Path) -> _Contents:
    indices = sorted(path.glob(f"*{_INDEX}"))
    contents = _read_shards(indices[0]) if indices else _read(_main_file(path))
    settings = next((path / name for name in _SETTINGS if (path / name).is_file()), None)
    if settings is not None and "flowcore.config" not in contents.metadata:
        contents.metadata["flowcore.config"] = settings.read_text(encoding="utf-8")
    return contents


def _main_file(path: Path) -> Path:
    """Return a folder's weights: safetensors before torch files, one with a usual name before others."""
    for suffixes in ((".safetensors",), _PICKLED):
        files = sorted(file for file in path.iterdir() if file.suffix in suffixes)
        usual = [file for stem in _STEMS for file in files if file.stem == stem]
        if usual or len(files) == 1:
            return (usual or files)[0]
        if files:
            names = ", ".join(file.name for file in files[:5])
            raise CheckpointError(f"{path} must hold one file of weights, got {names}; name one of them")
    inner = sorted({file.parent.name for file in path.glob("*/*.safetensors")})
    hint = f"; name one of its folders {', '.join(inner)}" if inner else ""
    raise CheckpointError(f"{path} must hold a file of weights, got none{hint}")


def _read_shards(index: Path) -> _Contents:
    """Return the tensors of all files that an index names; each tensor must be where the index says."""
    try:
        places: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError) as err:
        raise CheckpointError(f"{index} must be JSON with a weight_map, got a fault at {err}") from err
    files: dict[str, MappedFile] = {}
    metadata: dict[str, str] = {}
    for name in sorted(set(places.values())):
        shard = index.parent / name
        if not shard.is_file():
            raise CheckpointError(f"{shard} must be there, for {index.name} names it, got nothing")
        held, stated = _map_safetensors(shard)
        files.update(held)
        metadata.update(stated)
    missing = [name for name in places if name not in files]
    if missing:
        raise CheckpointError(
            f"{index} must name tensors that its files hold, got {missing[0]} in none of them"
        )
    return _Contents(tensors=StoredTensors(files), metadata=metadata)


def _read_pickled(path: Path) -> _Contents:
    if not zipfile.is_zipfile(path):  # of torch before 1.6: it cannot be mapped
        return _Contents(tensors=_unpickled(path), metadata={})
    mapped = MappedFile(path, _pickle_reader)
    return _Contents(tensors=StoredTensors(dict.fromkeys(_unpickled(path), mapped)), metadata={})


def _pickle_reader(path: Path) -> Reader:
    tensors = _unpickled(path)
    return lambda name: tensors[name].detach()  # another object, whose end is noticed


def _unpickled(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a torch file, mapped where it can be. Raises: CheckpointError."""
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as err:
        reason = str(err).splitlines()[0] if str(err) else type(err).__name__
        raise CheckpointError(
            f"{path} must be a torch file of tensors in plain containers, got {reason[:200]}; "
            "convert it to safetensors"
        ) from err
    while isinstance(loaded, Mapping):
        inner = next((loaded[name] for name in _CONTAINERS if isinstance(loaded.get(name), Mapping)), None)
        if inner is None:
            return {str(name): value for name, value in loaded.items() if isinstance(value, Tensor)}
        loaded = inner
    raise CheckpointError(f"{path} must hold a dictionary of tensors, got {type(loaded).__name__}")


def _tensor_to_metadata(path: Path, name: str, tensor: Tensor) -> dict[str, str]:
    try:
        return dict(json.loads(bytes(tensor.to(torch.uint8).flatten().tolist())))
    except ValueError as err:
        raise CheckpointError(f"{path}: {name} must be JSON in UTF-8, got {err}; delete the tensor") from err
