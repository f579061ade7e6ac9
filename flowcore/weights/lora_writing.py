"""LoRA files as this project, kohya's scripts, or diffusers name them."""

import json
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import ConfigError
from ..models import Architecture
from .atomic import write_tensors
from .lora import Lora
from .lora_delta import Change

LAYOUTS = ("diffusion_model", "kohya", "diffusers")
NATIVE = "native"


class LoraPair(NamedTuple):
    """An adapter of one layer: alpha / r * up @ down. Shapes: down `r in`, up `out r`."""

    down: Tensor
    up: Tensor
    alpha: float


def save_lora(
    path: str | Path,
    pairs: Mapping[str, LoraPair],
    *,
    architecture: Architecture,
    layout: str = "diffusion_model",
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write adapters, by the layers' own names, to a safetensors file, replacing an earlier one in one step.

    layout: `diffusion_model` is the project's own, which ComfyUI's LoRA loader takes for any model; `kohya`
        has underscores in names; `diffusers` splits fused layers and folds alpha into the up matrix; `native`
        is the form of the architecture's own trainer, where it has one.
    metadata: further entries; they win over the standard ones.
    Raises: CheckpointError if the file cannot be written; ConfigError if the layout cannot hold the adapters.
    """
    standard = {
        "flowcore.arch": architecture.name,
        "flowcore.lora_rank": str(max((pair.down.shape[0] for pair in pairs.values()), default=0)),
        "flowcore.lora_targets": json.dumps(list(pairs)),
    }
    if layout == NATIVE and architecture.export_lora is not None:
        tensors, own = architecture.export_lora(lora_tensors(pairs, architecture=architecture))
        standard |= own
    else:
        tensors = lora_tensors(pairs, architecture=architecture, layout=layout)
    write_tensors(path, tensors, {**standard, **(metadata or {})})


def lora_tensors(
    pairs: Mapping[str, LoraPair], *, architecture: Architecture, layout: str = "diffusion_model"
) -> dict[str, Tensor]:
    """Return adapters under the keys of a layout other than `native`, as `save_lora` writes them."""
    if layout not in LAYOUTS:
        native = () if architecture.export_lora is None else (NATIVE,)
        raise ConfigError(f"the LoRA layout must be one of {', '.join((*LAYOUTS, *native))}, got {layout!r}")
    if layout == "diffusers":
        return _diffusers_tensors(pairs, architecture)
    result = {}
    for layer, pair in pairs.items():
        if layout == "kohya":
            name, down, up = f"lora_unet_{layer.replace('.', '_')}", "lora_down", "lora_up"
        else:
            name, down, up = f"diffusion_model.{layer}", "lora_A", "lora_B"
        result[f"{name}.{down}.weight"] = pair.down
        result[f"{name}.{up}.weight"] = pair.up
        result[f"{name}.alpha"] = torch.tensor(float(pair.alpha))
    return result


def _diffusers_tensors(pairs: Mapping[str, LoraPair], architecture: Architecture) -> dict[str, Tensor]:
    """Return the pairs by diffusers' names; a part of a fused layer has its down and rows of its up."""
    shapes = {layer: (pair.up.shape[0], pair.down.shape[1]) for layer, pair in pairs.items()}
    names = architecture.diffusers_names(shapes)
    nameless = set(pairs) - {layer for layer, _ in names.values()}
    if nameless:
        raise ConfigError(
            f"layers of a LoRA in the layout of diffusers must have names there, got {sorted(nameless)[0]}; "
            "use the layout diffusion_model"
        )
    result = {}
    for name, (layer, rows) in names.items():
        pair = pairs[layer]
        up = scaled(pair.up, pair.alpha, pair.down.shape[0])
        result[f"transformer.{name}.lora_A.weight"] = pair.down
        result[f"transformer.{name}.lora_B.weight"] = torch.cat([up[part] for part in rows]) if rows else up
    return result


def to_pairs(lora: Lora, state: Mapping[str, Tensor]) -> dict[str, LoraPair]:
    """Return one pair for each layer that a LoRA changes, to write it in another layout.

    Adapters of parts of a layer that share their down matrix become one, exactly; others one of the sum of
    their ranks: down matrices stacked, up matrices in their rows and zero elsewhere, alpha / rank in the up
    matrix.
    state: of the model that the LoRA is for; its shapes count alone.
    Raises: ConfigError if the LoRA holds anything besides pairs of matrices.
    """
    result = {}
    for parameter, group in groupby(lora.changes, key=lambda change: change.parameter):
        changes = list(group)
        other = next((change for change in changes if set(change.parts) != {"down", "up"}), None)
        if other is not None:
            raise ConfigError(
                f"a LoRA to rewrite must hold pairs alone, got {', '.join(other.parts)} in {other.key}"
            )
        result[parameter.removesuffix(".weight")] = _joined(changes, state[parameter].shape[0])
    return result


def _joined(changes: Sequence[Change], height: int) -> LoraPair:
    """Return what several pairs do to one layer as a pair."""
    down, alpha = changes[0].parts["down"], changes[0].alpha
    ups = [_placed(change, height) for change in changes]
    is_shared = all(change.alpha == alpha and torch.equal(change.parts["down"], down) for change in changes)
    if is_shared:
        up = ups[0] if len(ups) == 1 else torch.stack(ups).sum(dim=0, dtype=ups[0].dtype)
        return LoraPair(down, up, float(down.shape[0] if alpha is None else alpha))
    down = torch.cat([change.parts["down"].float() for change in changes])
    ups = [
        scaled(up, change.alpha, change.parts["down"].shape[0]).float()
        for up, change in zip(ups, changes, strict=True)
    ]
    return LoraPair(down, torch.cat(ups, dim=1), float(down.shape[0]))


def scaled(up: Tensor, alpha: float | None, rank: int) -> Tensor:
    """Return up * alpha / rank, float32; up itself where the factor is 1."""
    return up if alpha is None or alpha == rank else up.float() * (alpha / rank)


def _placed(change: Change, height: int) -> Tensor:
    """Return the up matrix `height r` with its rows where the layer has them."""
    up = change.parts["up"]
    if not change.rows:
        return up
    result, start = up.new_zeros(height, up.shape[1]), 0
    for rows in change.rows:
        count = len(range(*rows.indices(height)))
        result[rows] = up[start : start + count]
        start += count
    return result
