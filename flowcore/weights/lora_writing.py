"""LoRA files as this project, kohya's scripts, or diffusers name them."""

import json
from collections.abc import Mapping
from itertools import groupby
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from ..errors import ConfigError
from ..models import Architecture
from .atomic import write_tensors
from .lora import Lora
from .lora_delta import Change

LoraLayout = Literal["diffusion_model", "kohya", "diffusers"]


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
    layout: LoraLayout = "diffusion_model",
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write adapters, by the layers' own names, to a safetensors file, replacing an earlier one in one step.

    layout: `diffusion_model` is the project's own, which ComfyUI's LoRA loader takes for any model; `kohya`
        has underscores in names; `diffusers` splits fused layers and folds alpha into the up matrix.
    metadata: further entries; they win over the standard ones.
    Raises: CheckpointError if the file cannot be written; ConfigError if the layout cannot hold the adapters.
    """
    standard = {
        "flowcore.arch": architecture.name,
        "flowcore.lora_rank": str(max((pair.down.shape[0] for pair in pairs.values()), default=0)),
        "flowcore.lora_targets": json.dumps(list(pairs)),
    }
    tensors = lora_tensors(pairs, architecture=architecture, layout=layout)
    write_tensors(path, tensors, {**standard, **(metadata or {})})


def lora_tensors(
    pairs: Mapping[str, LoraPair], *, architecture: Architecture, layout: LoraLayout = "diffusion_model"
) -> dict[str, Tensor]:
    """Return adapters under the keys of a layout, as `save_lora` writes them."""
    if layout not in get_args(LoraLayout):
        raise ConfigError(f"the LoRA layout must be one of {get_args(LoraLayout)}, got {layout!r}")
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
        up = pair.up * (pair.alpha / pair.down.shape[0])
        result[f"transformer.{name}.lora_A.weight"] = pair.down
        result[f"transformer.{name}.lora_B.weight"] = torch.cat([up[part] for part in rows]) if rows else up
    return result


def to_pairs(lora: Lora, state: Mapping[str, Tensor]) -> dict[str, LoraPair]:
    """Return one pair for each layer that a LoRA changes, to write it in another layout.

    Adapters of parts of a layer become one of the sum of their ranks: down matrices stacked, up matrices in
    their rows and zero elsewhere, alpha / rank in the up matrix.
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
        down = torch.cat([change.parts["down"].float() for change in changes])
        up = torch.cat([_placed(change, state[parameter].shape[0]) for change in changes], dim=1)
        result[parameter.removesuffix(".weight")] = LoraPair(down, up, float(down.shape[0]))
    return result


def _placed(change: Change, height: int) -> Tensor:
    """Return the scaled up matrix `height r` with its rows where the layer has them."""
    up = change.parts["up"].float()
    rank = change.parts["down"].shape[0]
    up = up if change.alpha is None else up * (change.alpha / rank)
    if not change.rows:
        return up
    result, start = up.new_zeros(height, rank), 0
    for rows in change.rows:
        count = len(range(*rows.indices(height)))
        result[rows] = up[start : start + count]
        start += count
    return result
