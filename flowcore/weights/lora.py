"""LoRA files on top of a model: every circulating form of key is read, and merging can be undone exactly.

A file is read for one model. What it says becomes a list of changes to parameters of that model, in whatever
form it is written; a layer that a file knows as several, or as a part, is found by its rows.
"""

import json
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..errors import CheckpointError
from ..models import ARCHITECTURES, Architecture, LayerNames
from .checkpoint import read_tensors
from .kinds import describe_names
from .lora_delta import Change, changed

PREFIXES = ("base_model.model.", "diffusion_model.", "transformer.", "model.", "pipe.", "unet.")
"""What files put before a layer's name, one or several of them."""
FLAT_PREFIXES = ("lora_unet_", "lora_transformer_", "lycoris_model_", "lycoris_", "")
"""What files put before a name with underscores for dots."""

ROLES: Mapping[str, tuple[str, ...]] = {
    "down": (
        "lora_down.weight",
        "lora_A.weight",
        "lora_A.default.weight",
        "lora.down.weight",
        "lora_linear_layer.down.weight",
        "down.weight",
        "lora_A",
    ),
    "up": (
        "lora_up.weight",
        "lora_B.weight",
        "lora_B.default.weight",
        "lora.up.weight",
        "lora_linear_layer.up.weight",
        "up.weight",
        "lora_B",
    ),
    "bias": ("lora_B.bias", "lora_up.bias", "diff_b", "b_norm"),
    "alpha": ("alpha",),
    "magnitude": ("dora_scale", "lora_magnitude_vector", "lora_magnitude_vector.weight"),
    "diff": ("diff", "w_norm"),
    "set": ("set_weight",),
    **{
        name: (name,)
        for name in (
            *("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),
            *("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b"),
        )
    },
}
"""What a tensor of an adapter is, by the end of its key."""

_FIRST_NUMBER = re.compile(r"(blocks[._])\d+")

_SUFFIXES = sorted(
    ((end, role) for role, ends in ROLES.items() for end in ends), key=lambda pair: -len(pair[0])
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Lora:
    """What a file changes in a model, and the keys that belong to nothing in it (often a text encoder)."""

    changes: tuple[Change, ...]
    unused: tuple[str, ...]
    report: str


def load_lora(path: str | Path, state: Mapping[str, Tensor], architecture: Architecture) -> Lora:
    """Return the LoRA of a file for a model's tensors.

    Raises: CheckpointError if the file is unreadable, or is for another model.
    """
    tensors, metadata = read_tensors(path)
    return parse_lora(tensors, metadata, state, architecture, source=str(path))


def parse_lora(
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    state: Mapping[str, Tensor],
    architecture: Architecture,
    *,
    source: str,
) -> Lora:
    """Return the LoRA of tensors already read, as `load_lora`; source: where they are from, for messages."""
    tensors = architecture.convert_lora(tensors, metadata)
    names = _Names(state, architecture)
    adapters: dict[str, dict[str, Tensor]] = {}
    changes: list[Change] = []
    unused: list[str] = []
    for key, tensor in tensors.items():
        name, role = _split(key)
        if role is None and (parameter := names.parameter(key)) is not None:
            changes.append(Change(parameter=parameter, parts={"set": tensor}, key=key))
        elif role is None or (names.layer(name) is None and names.parameter(name) is None):
            unused.append(key)
        else:
            adapters.setdefault(name, {})[role] = tensor
    alphas = _Alphas(metadata, source)
    for name, parts in adapters.items():
        changes += _layer_changes(name, parts, names, alphas)
    if not adapters:
        other = lora_architecture(tensors)
        what = f"a LoRA for {other.name}" if other else f"{describe_names(tensors)}, which fits no layer"
        raise CheckpointError(f"{source} must be a LoRA for this {architecture.name} model, got {what}")
    changes.sort(key=lambda change: change.parameter)
    report = f"{source}: {len(changes)} changes" + (
        f", {len(unused)} unused keys ({', '.join(unused[:5])}{', ...' if len(unused) > 5 else ''})"
        if unused
        else ""
    )
    return Lora(changes=tuple(changes), unused=tuple(unused), report=report)


def lora_architecture(keys: Collection[str]) -> Architecture | None:
    """Return the architecture whose layers a LoRA file names most of, or None if it names none."""
    counts = {row.name: 0 for row in ARCHITECTURES}
    for row in ARCHITECTURES:
        names = _Names(row.model(row.presets["demo"], device="meta").state_dict(), row)
        for key in keys:
            name, role = _split(_FIRST_NUMBER.sub(r"\g<1>0", key))
            counts[row.name] += role is not None and names.layer(name) is not None
    best = max(ARCHITECTURES, key=lambda row: counts[row.name])
    return best if counts[best.name] else None


def describe_lora(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return what a LoRA file holds: architecture, number of adapters, ranks, as JSON-like values."""
    row = lora_architecture(tensors)
    parts = [(*_split(key), tensor) for key, tensor in tensors.items()]
    return {
        "architecture": row.name if row else None,
        "adapters": len({name for name, role, _ in parts if role is not None}),
        "ranks": sorted({tensor.shape[0] for _, role, tensor in parts if role == "down"}),
    }


def merged_tensors(state: Mapping[str, Tensor], lora: Lora, strength: float = 1.0) -> dict[str, Tensor]:
    """Return the tensors of the state that the LoRA changes, changed; the state itself stays as it is.

    Computed in float32, each tensor in the dtype it had. A control LoRA may widen the input layer; build the
    model from the merged tensors then.
    Raises: CheckpointError if a part of the LoRA does not have the shape of its layer.
    """
    may_widen = any(change.replaces for change in lora.changes)
    result = {}
    for name, changes in groupby(lora.changes, key=lambda change: change.parameter):
        total = state[name].float()
        for change in changes:
            total = changed(total, change, strength, may_widen=may_widen)
        result[name] = total.to(state[name].dtype)
    return result


def merge(module: nn.Module, lora: Lora, strength: float = 1.0) -> dict[str, Tensor]:
    """Put the merged weights into a model; return the former ones, which `restore` puts back bit by bit.

    Raises: CheckpointError as `merged_tensors`, or if the LoRA widens a layer.
    """
    parameters = dict(module.named_parameters())
    changed_weights = merged_tensors({name: p.detach() for name, p in parameters.items()}, lora, strength)
    for name, tensor in changed_weights.items():
        if tensor.shape != parameters[name].shape:
            raise CheckpointError(
                f"{name} must keep its shape {tuple(parameters[name].shape)} in a model, got "
                f"{tuple(tensor.shape)}; build the model from the merged tensors"
            )
    return _exchange(parameters, changed_weights)


def restore(module: nn.Module, originals: Mapping[str, Tensor]) -> None:
    """Put back the weights that `merge` returned."""
    _exchange(dict(module.named_parameters()), originals)


def _exchange(parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    former = {}
    for name, tensor in tensors.items():
        former[name] = parameters[name].data
        parameters[name].data = tensor
    return former


def layer_shapes(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Return the weight shapes of a state's layers with matrices, by the layers' names."""
    return {
        name.removesuffix(".weight"): tuple(tensor.shape)
        for name, tensor in state.items()
        if name.endswith(".weight") and tensor.ndim == 2
    }


class _Names:
    """Finds the layer or parameter that a key means."""

    def __init__(self, state: Mapping[str, Tensor], architecture: Architecture) -> None:
        self.state = state
        own: LayerNames = {
            name.removesuffix(".weight"): (name.removesuffix(".weight"), ())
            for name in state
            if name.endswith(".weight")
        }
        self.dotted = {**architecture.lora_names(layer_shapes(state)), **own}
        self.flat = {name.replace(".", "_"): target for name, target in self.dotted.items()}

    def layer(self, name: str) -> tuple[str, tuple[slice, ...]] | None:
        """The layer and rows of a name in any form, or None."""
        if "." not in name:
            found = (self.flat.get(name[len(p) :]) for p in FLAT_PREFIXES if name.startswith(p))
            return next((target for target in found if target is not None), None)
        return next((self.dotted[short] for short in _shortened(name) if short in self.dotted), None)

    def parameter(self, name: str) -> str | None:
        """The parameter of a dotted name, or None."""
        return next((short for short in _shortened(name) if short in self.state), None)


def _shortened(name: str) -> list[str]:
    """Return the name, and what is left of it after each prefix that it has."""
    names = [name]
    while prefix := next((p for p in PREFIXES if names[-1].startswith(p)), ""):
        names.append(names[-1][len(prefix) :])
    return names


def _split(key: str) -> tuple[str, str | None]:
    """Return the layer's name and the role of a key, or the key and None."""
    for end, role in _SUFFIXES:
        if key.endswith("." + end):
            return key[: -len(end) - 1], role
    return key, None


def _layer_changes(name: str, parts: dict[str, Tensor], names: _Names, alphas: "_Alphas") -> list[Change]:
    """Return the changes that the tensors of one adapter make."""
    layer = names.layer(name)
    if layer is None:
        parameter = names.parameter(name)
        assert parameter is not None  # as the key was kept
        return [Change(parameter=parameter, parts=parts, key=name)]
    path, rows = layer
    bias = parts.pop("bias", None)
    alpha = parts.pop("alpha", None)
    changes = []
    if parts:
        scale = alphas.of(name, parts.get("down")) if alpha is None else float(alpha)
        changes.append(Change(parameter=f"{path}.weight", rows=rows, parts=parts, alpha=scale, key=name))
    if bias is not None:
        if f"{path}.bias" not in names.state:
            raise CheckpointError(f"{name} must not change a bias, for the model's {path} has none")
        changes.append(Change(parameter=f"{path}.bias", rows=rows, parts={"diff": bias}, key=name))
    return changes


class _Alphas:
    """The alphas that PEFT's configuration in a file's metadata states; a file with `.alpha` needs none."""

    def __init__(self, metadata: Mapping[str, str], source: str) -> None:
        try:
            stored = json.loads(metadata.get("lora_adapter_metadata", "{}"))
        except json.JSONDecodeError as err:
            raise CheckpointError(
                f"{source}: lora_adapter_metadata must be JSON, got an error at {err.pos}"
            ) from err
        settings: dict[str, Any] = {key.rsplit(".", 1)[-1]: value for key, value in stored.items()}
        self.default = settings.get("lora_alpha")
        self.by_layer: Mapping[str, float] = settings.get("alpha_pattern") or {}
        self.is_by_root = bool(settings.get("use_rslora"))

    def of(self, name: str, down: Tensor | None) -> float | None:
        """The alpha of a layer, or None where it is the rank."""
        alpha = next(
            (value for end, value in self.by_layer.items() if name == end or name.endswith(f".{end}")),
            self.default,
        )
        if alpha is None or down is None:
            return None
        return float(alpha) * (math.sqrt(down.shape[0]) if self.is_by_root else 1.0)
