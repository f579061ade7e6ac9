"""Exo in the project's convention: latents, noise level and conditioning in, velocity noise - clean out."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...conditioning import Conditioning
from ...errors import ShapeError

EXTRAS = ("pixels", "grids")
"""Names of `Conditioning.extras` that Exo understands: each prompt's picture, as `Exo.encode` takes it."""


def velocity(
    forward: Callable[..., Tensor],
    latents: Tensor,
    sigma: Tensor,
    conditioning: Conditioning,
    *,
    dtype: torch.dtype | None = None,
    **options: Any,
) -> Tensor:
    """Return the velocity `b c h w` in the dtype of latents; Exo's own time and sign are the project's.

    Args:
        forward: an Exo's forward, bound.
        latents: `b c h w`.
        sigma: `b` in [0, 1], 1 = noise, float32.
        conditioning: the context is token ids `b m 1`, whole numbers, with their mask; extras are named by
            `EXTRAS`. Its batch is 1 or that of latents.
        dtype: what the network computes in; None = the dtype of latents.
        options: passed to forward. With prefix, the result of `Exo.encode` for these conditions, nothing of
            them is computed again; iterations, record, runtime.

    Raises: ShapeError for a context that is no token ids, and for an extra that Exo does not know.
    """
    unknown = set(conditioning.extras) - set(EXTRAS)
    if unknown:
        raise ShapeError(f"conditions of exo must be among {EXTRAS}, got {sorted(unknown)}")
    ids = conditioning.context
    if ids is None or ids.ndim != 3 or ids.shape[-1] != 1 or ids.is_floating_point():
        found = "none" if ids is None else f"{ids.dtype} {tuple(ids.shape)}"
        raise ShapeError(f"the context of exo must be token ids `b m 1`, whole numbers, got {found}")
    if conditioning.batch != 1:
        conditioning = conditioning.expand(latents.shape[0])
    result = forward(
        latents.to(dtype or latents.dtype),
        sigma,
        ids[..., 0],
        conditioning.context_mask,
        **conditioning.extras,
        **options,
    )
    return result.to(latents.dtype)
