"""TinyFlux's extras on their way through ComfyUI: the guidance that old versions embed."""

from collections.abc import Mapping
from typing import Any

import comfy.conds
import torch
from torch import Tensor

from ...flowcore.models.tinyflux import TinyFluxConfig


def pack(conditions: Mapping[str, Any], config: TinyFluxConfig) -> dict[str, comfy.conds.CONDRegular]:
    """Return the guidance where the model embeds it and a node gives it."""
    if not config.guidance_embeds or conditions.get("guidance") is None:
        return {}
    return {"guidance": comfy.conds.CONDRegular(torch.FloatTensor([conditions["guidance"]]))}


def unpack(
    x: Tensor,  # noqa: ARG001 - as `Host.unpack`
    timestep: Tensor,  # noqa: ARG001
    extras: Mapping[str, Any],
    config: TinyFluxConfig,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the extras of the batch, and no further keyword arguments."""
    return {"guidance": extras["guidance"]} if config.guidance_embeds and "guidance" in extras else {}, {}
