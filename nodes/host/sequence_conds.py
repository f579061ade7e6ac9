"""Positions of a Flux between sequences on their way through ComfyUI: whole numbers, which it never casts."""

from collections.abc import Mapping
from typing import Any

import comfy.conds
from torch import Tensor

from ...flowcore.conditioning import Conditioning
from ...flowcore.errors import ConfigError, ShapeError
from ...flowcore.models.flux import FluxConfig

POSITIONS = "flowcore_positions"
"""Entry of a conditioning: positions of the condition's tokens and of the data's, `1 m a` and `1 n a`."""


def entries(conditioning: Conditioning) -> dict[str, Any]:
    """Return the entries of a part of the conditioning for what `conditioning_of` returns."""
    return {POSITIONS: (conditioning.extras["txt_ids"], conditioning.extras["img_ids"])}


def pack(conditions: Mapping[str, Any], config: FluxConfig) -> dict[str, comfy.conds.CONDRegular]:
    """Return the positions in ComfyUI's containers.

    Raises: ConfigError if the conditioning is not from Sequence Conditioning; ShapeError if the latents are
        not as many tokens as it was made for.
    """
    if POSITIONS not in conditions:
        raise ConfigError(
            "conditioning for a Flux between sequences must come from Sequence Conditioning, got one without "
            "positions"
        )
    condition, data = conditions[POSITIONS]
    expected, shape = (config.in_channels, data.shape[1]), tuple(conditions["noise"].shape)
    if shape[1:] != expected:
        raise ShapeError(
            f"latents for this model must be b {expected[0]} {expected[1]}, a token a column, got {shape}; "
            "use Empty Sequence or Sequence Encode"
        )
    return {"txt_ids": comfy.conds.CONDRegular(condition), "img_ids": comfy.conds.CONDRegular(data)}


def unpack(
    x: Tensor,  # noqa: ARG001 - as `Host.unpack`
    timestep: Tensor,  # noqa: ARG001
    extras: Mapping[str, Any],
    config: FluxConfig,  # noqa: ARG001
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the positions, and no further keyword arguments."""
    return {name: extras[name] for name in ("txt_ids", "img_ids")}, {}
