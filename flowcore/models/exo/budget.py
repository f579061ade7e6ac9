"""How many parameters each part of Exo has, counted on the meta device: nothing is allocated."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import nn

from ...errors import ConfigError
from .config import PRESETS, ExoConfig
from .model import Exo
from .trunk import build_trunk

_LORA_RANK = 16
"""Counted where a preset has none."""
_PARTS = ("lora", "adapters", "tokens", "projector", "memory", "diffusion_head", "edit_head")


def count_parameters(config: ExoConfig) -> dict[str, int]:
    """Return the parameters of each part, of both heads, of all that is Exo's own, and of everything.

    The trunk has no output layer; the autoencoder is not counted.
    Raises: ConfigError if the trunk's settings do not fit transformers' Qwen3-VL.
    """
    rank = config.lora_rank or _LORA_RANK
    trunk = build_trunk(config.trunk, device="meta")
    model = Exo(replace(config, lora_rank=rank, embeds_trunk=False, words=()), device="meta")
    counts = {
        "trunk, text": _count(trunk.get_submodule("language_model")),
        "trunk, vision": _count(trunk.get_submodule("visual")),
        **{name: _count(model.get_submodule(name)) for name in _PARTS},
    }
    return {
        **counts,
        "both heads": counts["diffusion_head"] + counts["edit_head"],
        "own": _count(model),
        "total": sum(counts.values()),
    }


def budget_table(names: Sequence[str] = ()) -> str:
    """Return the counts of presets as text, a column each; no name = all presets.

    Raises: ConfigError for an unknown preset.
    """
    unknown = [name for name in names if name not in PRESETS]
    if unknown:
        raise ConfigError(f"presets of exo must be among {', '.join(PRESETS)}, got {unknown[0]!r}")
    columns = {name: count_parameters(PRESETS[name]) for name in names or PRESETS}
    rows = [["", *columns], *_rows(columns)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = (
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)


def _rows(columns: Mapping[str, Mapping[str, int]]) -> list[list[str]]:
    parts = next(iter(columns.values()))
    return [[part, *(f"{counts[part]:,}" for counts in columns.values())] for part in parts]


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
