"""XUT's extras on their way through ComfyUI: from conditioning entries to the model's arguments.

ComfyUI casts every floating-point tensor to the compute dtype, which can be bfloat16. What must stay exact
travels as plain numbers (parts with different ones are not batched together) or as fixed-point integers.
"""

import math
from collections.abc import Mapping
from typing import Any

import comfy.conds
import torch
from einops import rearrange
from torch import Tensor

from ...flowcore.errors import ConfigError
from ...flowcore.models.xut.config import XUTConfig
from ...flowcore.models.xut.positions import camera_positions

_FIXED_POINT = 2.0**24
_NO_CAMERA = (1.0, 0.0, 0.0)


def pack(conditions: Mapping[str, Any], config: XUTConfig) -> dict[str, comfy.conds.CONDRegular]:
    """Return the extras of one part of the conditioning in ComfyUI's containers.

    Raises: ConfigError if the model lacks the layer that an extra needs.
    """
    found: dict[str, comfy.conds.CONDRegular] = {}
    height, width = conditions["noise"].shape[
        -2:
    ]  # of the whole picture, also when this part is an area of it
    if config.addon_info_embs_dim == 1:
        aspect = conditions.get("flowcore_aspect", width / height)
        found["log_aspect"] = comfy.conds.CONDConstant(math.log(aspect))
    elif "flowcore_aspect" in conditions:
        raise ConfigError(
            "the model for XUT Aspect must take an aspect ratio, got one without; remove the node"
        )
    camera = conditions.get("flowcore_camera", _NO_CAMERA)
    if tuple(camera) != _NO_CAMERA or conditions.get("area") is not None:
        found["pos_map"] = comfy.conds.CONDNoiseShape(
            _fixed_point_map(height, width, camera, config.patch_size)
        )
    rate, seed = conditions.get("flowcore_tread", (0.0, 0))
    if rate > 0:
        if config.tread_config is None:
            raise ConfigError(
                "the model for XUT Token Dropping must have been trained with token routing, got one "
                "without; "
                "remove the node"
            )
        found["tread"] = comfy.conds.CONDConstant((rate, seed))
    class_id = conditions.get("flowcore_class")
    if class_id is not None:
        _check_class(class_id, config.class_cond)
        found["class_ids"] = comfy.conds.CONDRegular(torch.tensor([class_id], dtype=torch.long))
    return found


def unpack(
    x: Tensor, timestep: Tensor, extras: Mapping[str, Any], config: XUTConfig
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return what `velocity` takes: the extras of the batch, and its further keyword arguments."""
    batch = x.shape[0]
    named: dict[str, Tensor] = {}
    if "class_ids" in extras:
        named["class_ids"] = extras["class_ids"]
    if "log_aspect" in extras:
        named["addon_info"] = torch.full(
            (batch, 1), extras["log_aspect"], dtype=torch.float32, device=x.device
        )
    if "pos_map" in extras:
        named["pos_map"] = _to_positions(extras["pos_map"], config.patch_size)
    options: dict[str, Any] = {}
    if "tread" in extras:
        rate, seed = extras["tread"]
        options = {"tread_rate": rate, "generator": _generator(seed, float(timestep.flatten()[0]))}
    return named, options


def _check_class(class_id: int, num_classes: int) -> None:
    if not 0 <= class_id < num_classes:
        kind = (
            f"one of the model's {num_classes} classes (0..{num_classes - 1})" if num_classes else "left out"
        )
        raise ConfigError(f"class_id must be {kind}, got {class_id}")


def _fixed_point_map(height: int, width: int, camera: tuple[float, float, float], patch_size: int) -> Tensor:
    """Return the positions `1 2 height width` of a picture as int32, of which ComfyUI cuts out areas."""
    zoom, x_shift, y_shift = camera
    positions = camera_positions(
        height, width, patch_size=patch_size, zoom=zoom, x_shift=x_shift, y_shift=y_shift
    )
    grid = rearrange(positions, "b (h w) a -> b a h w", h=height + -height % patch_size)
    return (grid[..., :height, :width].double() * _FIXED_POINT).round().to(torch.int32)


def _to_positions(fixed: Tensor, patch_size: int) -> Tensor:
    """Return positions `b (h w) 2` in float32, grown to a multiple of the patch size like the latents."""
    grid = _grow(_grow(fixed.double() / _FIXED_POINT, -2, patch_size), -1, patch_size)
    return rearrange(grid.float(), "b a h w -> b (h w) a")


def _grow(grid: Tensor, axis: int, multiple: int) -> Tensor:
    """Return the grid with equally spaced values added at the end of an axis, up to a multiple."""
    size = grid.shape[axis]
    last = grid.narrow(axis, size - 1, 1)
    step = last - grid.narrow(axis, max(size - 2, 0), 1)
    return torch.cat([grid, *(last + step * (i + 1) for i in range(-size % multiple))], dim=axis)


def _generator(seed: int, sigma: float) -> torch.Generator:
    """Return the random numbers of one level: the same for every call at it, whatever the sampler's order."""
    return torch.Generator().manual_seed((seed * 1_000_003 + round(sigma * 2**20)) % 2**63)
