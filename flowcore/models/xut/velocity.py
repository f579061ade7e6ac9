"""XUT in the project's convention: latents, noise level and conditioning in, velocity noise - clean out."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...conditioning import Conditioning
from ...errors import ShapeError
from .config import XUTConfig
from .positions import log_aspect

EXTRAS = ("class_ids", "pos_map", "r", "addon_info")
"""Names of `Conditioning.extras` that XUT understands."""


def velocity(
    forward: Callable[..., Tensor],
    latents: Tensor,
    sigma: Tensor,
    conditioning: Conditioning,
    *,
    dtype: torch.dtype | None = None,
    **options: Any,
) -> Tensor:
    """Return the velocity `b c h w` in the dtype of latents; XUT's own time and sign are the project's.

    Args:
        forward: a XUDiT's forward, bound.
        latents: `b c h w`.
        sigma: `b` in [0, 1], 1 = noise, float32.
        conditioning: context and mask, and the extras named by `EXTRAS`; its batch is 1 or that of latents.
        dtype: what the network computes in; None = the dtype of latents.
        options: passed to forward: tread_rate, generator, runtime.

    Raises: ShapeError for an extra that XUT does not know, and for class ids together with text.
    """
    unknown = set(conditioning.extras) - set(EXTRAS)
    if unknown:
        raise ShapeError(f"conditions of XUT must be among {EXTRAS}, got {sorted(unknown)}")
    conditioning = conditioning.expand(latents.shape[0])
    extras = dict(conditioning.extras)
    class_ids = extras.pop("class_ids", None)
    if class_ids is not None and conditioning.context is not None:
        raise ShapeError("class ids must come without a context, got both; a XUT model reads one of them")
    dtype = dtype or latents.dtype
    context = class_ids if conditioning.context is None else conditioning.context.to(dtype)
    result = forward(
        latents.to(dtype), sigma, context, ctx_mask=conditioning.context_mask, **extras, **options
    )
    return result.to(latents.dtype)


def size_extras(config: XUTConfig, width: int, height: int) -> dict[str, Tensor]:
    """Return the extras that follow from the image's size: ln(width / height) where the model reads it."""
    return {"addon_info": log_aspect(height, width)} if config.addon_info_embs_dim == 1 else {}
