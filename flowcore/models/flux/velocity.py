"""Flux in the project's convention: latents, noise level and conditioning in, velocity noise - clean out."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from ...conditioning import Conditioning
from ...errors import ShapeError
from ...layers.patch import pad_to_multiple
from .config import FluxConfig
from .packing import PATCH_SIZE, grid_ids, pack, unpack

EXTRAS = ("img_ids", "txt_ids", "guidance", "img_mask", "control", "reference")
"""Names of `Conditioning.extras` that Flux understands.

img_ids, txt_ids: positions as in `Flux.forward`; without them a grid has (0, row, column), the text zeros,
and a sequence must bring its own. guidance: `b`. img_mask: `b n` boolean, True = real data token. control:
further channels of the same grid or sequence. reference: latents `b c h w` of a picture to look at (Kontext).
"""
DEFAULT_GUIDANCE = 3.5


class _Tokens(NamedTuple):
    """Data tokens `b n c`, their positions, and how many of them, from the first, are to be predicted."""

    img: Tensor
    ids: Tensor
    num_noised: int


def velocity(
    forward: Callable[..., Tensor],
    latents: Tensor,
    sigma: Tensor,
    conditioning: Conditioning,
    *,
    dtype: torch.dtype | None = None,
    patch_size: int = PATCH_SIZE,
    generator: torch.Generator | None = None,  # noqa: ARG001 - as in the other architectures
    **options: Any,
) -> Tensor:
    """Return the velocity in the shape and dtype of latents; Flux's own time and sign are the project's.

    Args:
        forward: a Flux's forward, bound.
        latents: a grid `b c h w`, or a sequence `b c n`, a token a column.
        sigma: `b` in [0, 1], 1 = noise, float32.
        conditioning: context and mask, pooled vector, the extras named by `EXTRAS`; batch 1 or all of them.
        dtype: what the network computes in; None = the dtype of latents. Positions keep theirs.
        patch_size: latents a side of a token; a grid that is no multiple of it is padded and cropped again.
        generator: not read, for Flux draws nothing.
        options: passed to forward: runtime.

    Raises: ShapeError for an unknown extra, a missing context, or a sequence without positions.
    """
    unknown = set(conditioning.extras) - set(EXTRAS)
    if unknown:
        raise ShapeError(f"conditions of Flux must be among {EXTRAS}, got {sorted(unknown)}")
    if conditioning.context is None:
        raise ShapeError("the context must hold at least one token, got None")
    batch, dtype = latents.shape[0], dtype or latents.dtype
    extras = dict(conditioning.extras)
    # Positions are not expanded: samples that share them share one rotary table.
    img_ids, txt_ids = (extras.pop(name, None) for name in ("img_ids", "txt_ids"))
    conditioning = replace(conditioning, extras=extras).expand(batch)
    tokens = _tokens(latents, conditioning.extras, img_ids, patch_size)
    context, context_mask = conditioning.context, conditioning.context_mask
    assert context is not None  # as before it was expanded
    if txt_ids is None:
        txt_ids = tokens.ids.new_zeros(1, context.shape[1], tokens.ids.shape[-1])
    result = forward(
        tokens.img.to(dtype),
        tokens.ids,
        context.to(dtype),
        txt_ids,
        sigma,
        conditioning.pooled,
        conditioning.extras.get("guidance"),
        mask=_joint_mask(context, context_mask, tokens.img, conditioning.extras.get("img_mask")),
        **options,
    )
    result = result[:, : tokens.num_noised].to(latents.dtype)
    if latents.ndim == 3:
        return rearrange(result, "b n c -> b c n")
    height, width = latents.shape[-2:]
    rows, columns = (-(-side // patch_size) for side in (height, width))
    return unpack(result, rows, columns, patch_size)[..., :height, :width]


def default_extras(config: FluxConfig, _width: int, _height: int) -> dict[str, Tensor]:
    """Return the extras of a picture for which nothing is asked: the usual guidance where it is embedded."""
    return {"guidance": torch.tensor([DEFAULT_GUIDANCE])} if config.guidance_embed else {}


def _tokens(
    latents: Tensor, extras: Mapping[str, Tensor], img_ids: Tensor | None, patch_size: int
) -> _Tokens:
    """Return the tokens of latents and of what goes with them."""
    if latents.ndim not in (3, 4):
        raise ShapeError(f"latents must be a grid b c h w or a sequence b c n, got {tuple(latents.shape)}")
    channels = latents
    if "control" in extras:
        control = extras["control"].to(latents)
        if control.shape[2:] != latents.shape[2:]:
            raise ShapeError(
                f"control must have the size {tuple(latents.shape[2:])} of the latents, "
                f"got {tuple(control.shape[2:])}"
            )
        channels = torch.cat((latents, control), dim=1)
    if latents.ndim == 3:
        if img_ids is None or "reference" in extras:
            raise ShapeError("a sequence of tokens must come with img_ids and without a reference picture")
        return _Tokens(rearrange(channels, "b c n -> b n c"), img_ids, latents.shape[2])
    img, ids = _grid_tokens(channels, 0, patch_size)
    count = img.shape[1]
    ids = ids if img_ids is None else img_ids
    if "reference" in extras:
        behind, behind_ids = _grid_tokens(extras["reference"].to(latents), 1, patch_size)
        if behind.shape[2] != img.shape[2]:
            raise ShapeError(
                f"a reference picture must have the latents' channels, got {behind.shape[2]} a token for "
                f"{img.shape[2]}; use it without control"
            )
        img = torch.cat((img, behind), dim=1)
        ids = torch.cat((ids, behind_ids.to(ids.device).expand(ids.shape[0], -1, -1)), dim=1)
    return _Tokens(img, ids, count)


def _grid_tokens(latents: Tensor, index: int, patch_size: int) -> tuple[Tensor, Tensor]:
    """Return the tokens of a grid `b c h w`, grown to whole tokens, and their positions."""
    latents = pad_to_multiple(latents, patch_size)
    rows, columns = (side // patch_size for side in latents.shape[-2:])
    return pack(latents, patch_size), grid_ids(rows, columns, index, latents.device)


def _joint_mask(txt: Tensor, txt_mask: Tensor | None, img: Tensor, img_mask: Tensor | None) -> Tensor | None:
    """Return the mask `b (m n)` of all tokens, or None if every token is real; a reference always is."""
    if txt_mask is None and img_mask is None:
        return None
    masks = []
    for tokens, mask in ((txt, txt_mask), (img, img_mask)):
        real = tokens.new_ones(tokens.shape[:2], dtype=torch.bool)
        masks.append(
            real if mask is None else torch.cat((mask.to(real.device), real[:, mask.shape[1] :]), dim=1)
        )
    return torch.cat(masks, dim=1)
