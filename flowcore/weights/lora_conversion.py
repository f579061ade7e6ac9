"""LoRA files under the keys that other programs expect."""

import contextlib
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from ..errors import CheckpointError, ConfigError
from ..models import ARCHITECTURES, Architecture
from .checkpoint import load_model
from .kinds import describe_names
from .lora import Lora, lora_architecture, parse_lora
from .lora_writing import save_lora, to_pairs

DEFAULT_LAYOUT = "diffusion_model"
_KEPT = ("flowcore.", "modelspec.", "ss_")
"""How metadata begins that is true of a LoRA in every layout."""


def convert_lora(
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    target: str | Path,
    layout: str | None = None,
    *,
    source: str,
    base: str | Path | None = None,
) -> str:
    """Write a LoRA's tensors under the keys of a layout; return one line on what was written.

    base: the model that the LoRA is for; None = whichever published one its matrices fit.
    Raises: CheckpointError if the file is no LoRA for the model, or holds keys that belong to nothing in it;
        ConfigError if the layout is unknown or cannot hold what the file does.
    """
    architecture = lora_architecture(tensors)
    if architecture is None:
        raise CheckpointError(
            f"{source} must be a LoRA for {', '.join(row.name for row in ARCHITECTURES)}, got "
            f"{describe_names(tensors)}"
        )
    state, lora = _read(tensors, metadata, architecture, source, base)
    if lora.unused:
        raise CheckpointError(
            f"{source} must hold keys of the {architecture.name} model alone, got {len(lora.unused)} others: "
            f"{', '.join(lora.unused[:5])}; take them out of the file first"
        )
    pairs = to_pairs(lora, state)
    kept = {
        key: value
        for key, value in metadata.items()
        if key.startswith(_KEPT) and not key.startswith("flowcore.lora_")
    }
    layout = layout or DEFAULT_LAYOUT
    save_lora(target, pairs, architecture=architecture, layout=layout, metadata=kept)
    return f"{target}: LoRA for {architecture.name}, {len(pairs)} layers, layout {layout}"


def _read(
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    architecture: Architecture,
    source: str,
    base: str | Path | None,
) -> tuple[Mapping[str, Tensor], Lora]:
    """Return a model's tensors, of which shapes count alone, and the LoRA as it changes them."""
    if base is not None:
        loaded = load_model(base)
        state = loaded.model.state_dict()
        lora = parse_lora(tensors, metadata, state, loaded.architecture, source=source)
        if not _fits(lora, state):
            raise CheckpointError(f"{source} must fit the model {base}, got layers of other sizes")
        return state, lora
    found = []
    for preset in architecture.presets.values():
        state = architecture.model(preset, device="meta").state_dict()
        with contextlib.suppress(CheckpointError):  # another size's layers
            lora = parse_lora(tensors, metadata, state, architecture, source=source)
            if _fits(lora, state):
                found.append((state, lora))
        if found and not found[-1][1].unused:
            break
    if not found:
        raise ConfigError(
            f"{source} must fit a {architecture.name} model of a known size, "
            f"{', '.join(architecture.presets)}, got other layers; pass its model as --base FILE"
        )
    return min(found, key=lambda pair: len(pair[1].unused))


def _fits(lora: Lora, state: Mapping[str, Tensor]) -> bool:
    """Return whether all pairs of matrices have the sizes of their layers."""
    return all(
        change.parts["down"].flatten(1).shape[1] == state[change.parameter].flatten(1).shape[1]
        and change.parts["up"].shape[0] == change.height(state[change.parameter].shape[0])
        for change in lora.changes
        if {"down", "up"} <= set(change.parts)
    )
