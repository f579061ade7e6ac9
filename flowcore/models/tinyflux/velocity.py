"""TinyFlux in the project's convention: latents, noise level, conditioning in; velocity noise - clean out."""

from collections.abc import Callable
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from ...conditioning import Conditioning
from ...errors import ShapeError
from .inputs import ExpertUse

_PRESENCE = ("lune_present", "sol_present")
EXTRAS = ("guidance", "lune_features", "sol_stats", "sol_spatial", *_PRESENCE)
"""Names of `Conditioning.extras` that TinyFlux understands; all but guidance are for training."""


def velocity(
    forward: Callable[..., Any], latents: Tensor, sigma: Tensor, conditioning: Conditioning, **options: Any
) -> Tensor:
    """Return the velocity `b c h w` in the dtype of latents; TinyFlux's own time and sign are the reverse.

    Arguments and errors as `velocity_and_experts`.
    """
    return velocity_and_experts(forward, latents, sigma, conditioning, **options)[0]


def velocity_and_experts(
    forward: Callable[..., Any],
    latents: Tensor,
    sigma: Tensor,
    conditioning: Conditioning,
    *,
    dtype: torch.dtype | None = None,
    use_lune: bool = True,
    use_sol: bool = True,
    **options: Any,
) -> tuple[Tensor, dict[str, Any]]:
    """Return the velocity `b c h w` in the dtype of latents, and what the predictors said.

    Args:
        forward: a TinyFlux's forward, bound.
        latents: `b c h w`, of any size.
        sigma: `b` in [0, 1], 1 = noise, float32.
        conditioning: context, pooled vector and the extras named by `EXTRAS`; its batch is 1 or that of
            latents. Published models count padding as text: no mask.
        dtype: what the network computes in; None = the dtype of latents.
        use_lune: False leaves out what Lune adds, for a file whose predictor is untrained.
        use_sol: False leaves attention unsteered, likewise.
        options: passed to forward: generator, runtime.

    Raises: ShapeError for an extra that TinyFlux does not know, without a context, and as the forward does.
    """
    unknown = set(conditioning.extras) - set(EXTRAS)
    if unknown:
        raise ShapeError(f"conditions of TinyFlux must be among {EXTRAS}, got {sorted(unknown)}")
    if conditioning.context is None:
        raise ShapeError(
            "conditions of TinyFlux must have a context, got none; encode a prompt, empty or not"
        )
    if latents.ndim != 4:
        raise ShapeError(f"latents must be b c h w, got {tuple(latents.shape)}")
    conditioning = conditioning.expand(latents.shape[0]).to(latents.device)
    extras = conditioning.extras
    result, experts = forward(
        rearrange(latents.to(dtype or latents.dtype), "b c h w -> b (h w) c"),
        conditioning.context,
        conditioning.pooled,
        1 - sigma.float(),
        size=(latents.shape[2], latents.shape[3]),
        context_mask=conditioning.context_mask,
        use=ExpertUse(lune=use_lune, sol=use_sol, **{name: extras.get(name) for name in _PRESENCE}),
        **{name: value for name, value in extras.items() if name not in _PRESENCE},
        return_expert_pred=True,
        **options,
    )
    grid = rearrange(-result, "b (h w) c -> b c h w", h=latents.shape[2])
    return grid.to(latents.dtype), experts
