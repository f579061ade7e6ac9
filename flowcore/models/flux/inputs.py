"""The border check of Flux's inputs: once a call, nothing inside the blocks."""

import torch
from torch import Tensor

from ...errors import ShapeError
from .config import FluxConfig


def check_inputs(
    config: FluxConfig,
    img: Tensor,
    img_ids: Tensor,
    txt: Tensor,
    txt_ids: Tensor,
    timesteps: Tensor,
    *,
    y: Tensor | None,
    guidance: Tensor | None,
    mask: Tensor | None,
    in_channels: int,
) -> None:
    """Check tokens, positions and conditions against the configuration; in_channels: width of data tokens.

    Raises: ShapeError that names the input, the shape it must have, and the one it has.
    """
    batch = img.shape[0]
    _check_tokens("img", img, batch, in_channels)
    _check_tokens("txt", txt, batch, config.context_in_dim)
    _check_positions("img_ids", img_ids, img, config)
    _check_positions("txt_ids", txt_ids, txt, config)
    _check_scalars("timesteps", timesteps, batch)
    if y is None and config.needs_y:
        raise ShapeError(f"y must be {batch} {config.vec_in_dim} for a model of FLUX.1's sizes, got None")
    if y is not None and tuple(y.shape) != (batch, config.vec_in_dim):
        raise ShapeError(f"y must be {batch} {config.vec_in_dim}, got {tuple(y.shape)}")
    if config.guidance_embed:
        if guidance is None:
            raise ShapeError(
                f"guidance must be {batch} numbers, for the model embeds them, got None; try 3.5"
            )
        _check_scalars("guidance", guidance, batch)
    if mask is not None:
        expected = (batch, txt.shape[1] + img.shape[1])
        if mask.dtype != torch.bool or tuple(mask.shape) != expected:
            raise ShapeError(
                f"mask must be boolean {expected}, conditions first, got {mask.dtype} {tuple(mask.shape)}"
            )


def _check_tokens(name: str, tokens: Tensor, batch: int, width: int) -> None:
    if tokens.ndim != 3 or tokens.shape[0] != batch or tokens.shape[2] != width or tokens.shape[1] < 1:
        raise ShapeError(f"{name} must be {batch} n {width} with n at least 1, got {tuple(tokens.shape)}")


def _check_positions(name: str, ids: Tensor, tokens: Tensor, config: FluxConfig) -> None:
    batch, count, axes = tokens.shape[0], tokens.shape[1], len(config.axes_dim)
    if ids.ndim != 3 or ids.shape[0] not in (1, batch) or tuple(ids.shape[1:]) != (count, axes):
        raise ShapeError(
            f"{name} must be {batch} {count} {axes} or 1 {count} {axes}, a position on each of the axes "
            f"{list(config.axes_dim)} for each token, got {tuple(ids.shape)}"
        )
    if ids.dtype in (torch.float16, torch.bfloat16) or ids.dtype == torch.bool:
        raise ShapeError(
            f"{name} must be whole numbers or at least float32, got {ids.dtype}, which rounds positions"
        )


def _check_scalars(name: str, values: Tensor, batch: int) -> None:
    if values.numel() != batch:
        raise ShapeError(f"{name} must be one number for each of {batch} samples, got {tuple(values.shape)}")
