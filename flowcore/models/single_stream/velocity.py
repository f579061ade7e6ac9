"""SingleStreamDiT in the project's convention: latents, noise level, conditions in; noise - clean out."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...conditioning import Conditioning
from ...errors import ShapeError


def velocity(
    forward: Callable[..., Tensor],
    latents: Tensor,
    sigma: Tensor,
    conditioning: Conditioning,
    *,
    dtype: torch.dtype | None = None,
    **options: Any,
) -> Tensor:
    """Return the velocity `b c h w` in the dtype of latents; the network's time and sign run the other way.

    Args:
        forward: a SingleStreamDiT's forward, bound.
        latents: `b c h w`.
        sigma: `b` in [0, 1], 1 = noise, float32.
        conditioning: context and mask; its batch is 1 or that of latents. No context, or zeros: no text.
        dtype: what the network computes in; None = the dtype of latents.
        options: passed to forward: generator, runtime.

    Raises: ShapeError for any extra.
    """
    if conditioning.extras:
        raise ShapeError(
            f"conditions of single_stream must have no extras, got {sorted(conditioning.extras)}"
        )
    conditioning = conditioning.expand(latents.shape[0])
    dtype = dtype or latents.dtype
    context = None if conditioning.context is None else conditioning.context.to(dtype)
    result = forward(
        latents.to(dtype), 1 - sigma.float(), context, text_mask=conditioning.context_mask, **options
    )
    return -result.to(latents.dtype)
