"""Flux's extras on their way through ComfyUI, in the form of ComfyUI's own Flux: guidance and a reference."""

from collections.abc import Mapping
from typing import Any

import comfy.conds
from torch import Tensor

from ...flowcore.errors import ConfigError
from ...flowcore.models.flux import FluxConfig


def pack(conditions: Mapping[str, Any], _config: FluxConfig) -> dict[str, comfy.conds.CONDRegular]:
    """Return nothing: ComfyUI's own Flux packs guidance and reference pictures.

    Raises: ConfigError for what its network takes and this one does not.
    """
    references = conditions.get("reference_latents") or []
    if len(references) > 1:
        raise ConfigError(
            f"reference pictures must be at most one, got {len(references)}; stitch them into one picture"
        )
    if conditions.get("reference_latents_method") not in (None, "offset", "index"):
        raise ConfigError(
            "reference_latents_method must be offset or index, got "
            f"{conditions['reference_latents_method']!r}"
        )
    return {}


def unpack(
    x: Tensor,  # noqa: ARG001 - as `Host.unpack`
    timestep: Tensor,  # noqa: ARG001
    extras: Mapping[str, Any],
    config: FluxConfig,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the extras of the batch, and no further keyword arguments."""
    named: dict[str, Tensor] = {}
    if config.guidance_embed and "guidance" in extras:
        named["guidance"] = extras["guidance"]
    if extras.get("ref_latents"):
        named["reference"] = extras["ref_latents"][0]
    return named, {}


def unet_config(config: FluxConfig) -> dict[str, int]:
    """Return what ComfyUI's code for Flux reads: sizes, by which it knows diffusers' names of a LoRA."""
    cells = 4  # latents in a token
    return {
        "in_channels": config.in_channels // cells,
        "out_channels": config.out_channels // cells,
        "depth": config.depth,
        "depth_single_blocks": config.depth_single_blocks,
        "hidden_size": config.hidden_size,
    }
