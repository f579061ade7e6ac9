"""The border check of TinyFlux's inputs: once a call, nothing inside the blocks."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ...errors import ShapeError
from .config import TinyFluxConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertUse:
    """Which predictors act, and for which samples a teacher's values replace their predictions.

    lune, sol: False switches one off. lune_present, sol_present: `b` boolean, True = the sample has the
    teacher's values; None = all samples have, where such values are given.
    """

    lune: bool = True
    sol: bool = True
    lune_present: Tensor | None = None
    sol_present: Tensor | None = None


FULL_USE = ExpertUse()


class Text(NamedTuple):
    """Tokens `b m k`, the pooled vector `b k`, and the mask `b m`, True = real; None masks nothing."""

    tokens: Tensor
    pooled: Tensor | None
    mask: Tensor | None


class TeacherValues(NamedTuple):
    """What the teachers say: features `b k`, statistics `b 3`, maps `b s s`."""

    lune_features: Tensor | None
    sol_stats: Tensor | None
    sol_spatial: Tensor | None


def check_inputs(
    config: TinyFluxConfig, hidden_states: Tensor, text: Text, timestep: Tensor, guidance: Tensor | None
) -> None:
    """Check tokens and their conditions against the configuration.

    Raises: ShapeError that names the input, the shape it must have, and the one it has.
    """
    if hidden_states.ndim != 3 or hidden_states.shape[2] != config.in_channels:
        raise ShapeError(f"hidden_states must be b n {config.in_channels}, got {tuple(hidden_states.shape)}")
    batch, tokens = hidden_states.shape[0], text.tokens
    if tokens.ndim != 3 or tokens.shape[0] != batch or tokens.shape[2] != config.joint_attention_dim:
        raise ShapeError(
            f"encoder_hidden_states must be {batch} m {config.joint_attention_dim}, got {tuple(tokens.shape)}"
        )
    if timestep.numel() != batch:
        raise ShapeError(f"timestep must be one for each of {batch} samples, got {tuple(timestep.shape)}")
    if text.pooled is not None:
        _check_shape("pooled_projections", text.pooled, (batch, config.pooled_projection_dim))
    elif not config.pooled_from_text:
        raise ShapeError(
            f"pooled_projections must be {batch} {config.pooled_projection_dim}, got None; "
            "it is the pooled vector of the CLIP text encoder"
        )
    if text.mask is not None and text.mask.dtype != torch.bool:
        raise ShapeError(f"context_mask must be boolean, got {text.mask.dtype}")
    if text.mask is not None:
        _check_shape("context_mask", text.mask, (batch, tokens.shape[1]))
    if guidance is not None:
        _require(config.guidance_embeds, "guidance", "guidance_embeds")
        _check_shape("guidance", guidance, (batch,))


def check_teachers(config: TinyFluxConfig, batch: int, taught: TeacherValues, use: ExpertUse) -> None:
    """Check what teachers say against the configuration.

    Raises: ShapeError as `check_inputs` does.
    """
    side = config.sol_spatial_size
    for name, value, shape, part in (
        ("lune_features", taught.lune_features, (batch, config.lune_expert_dim), "use_lune_expert"),
        ("lune_present", use.lune_present, (batch,), "use_lune_expert"),
        ("sol_stats", taught.sol_stats, (batch, 3), "use_sol_prior"),
        ("sol_spatial", taught.sol_spatial, (batch, side, side), "use_sol_prior"),
        ("sol_present", use.sol_present, (batch,), "use_sol_prior"),
    ):
        if value is not None:
            _require(getattr(config, part), name, part)
            _check_shape(name, value, shape)


def check_size(size: tuple[int, int] | None, num_tokens: int) -> tuple[int, int]:
    """Return rows and columns of the image: as given, else those of a square, as the original assumes.

    Raises: ShapeError if they do not give the number of tokens.
    """
    if size is None:
        side = math.isqrt(num_tokens)
        if side * side != num_tokens:
            raise ShapeError(
                f"size must be (rows, columns) where an image is no square, got None for {num_tokens} tokens"
            )
        return side, side
    if size[0] * size[1] != num_tokens:
        raise ShapeError(f"size must give the number of tokens {num_tokens}, got {size[0]} x {size[1]}")
    return size


def check_positions(name: str, positions: Tensor, count: int) -> Tensor:
    """Return the positions `count 3` of `count 3` or `b count 3`, those of the first sample.

    Raises: ShapeError for another shape.
    """
    if positions.ndim not in (2, 3) or tuple(positions.shape[-2:]) != (count, 3):
        raise ShapeError(f"{name} must be {count} 3 or b {count} 3, got {tuple(positions.shape)}")
    return positions if positions.ndim == 2 else positions[0]


def _require(has_part: bool, name: str, field: str) -> None:
    if not has_part:
        raise ShapeError(f"{name} must be absent, for the model has no part for it ({field} is not set)")


def _check_shape(name: str, tensor: Tensor, expected: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != expected:
        raise ShapeError(f"{name} must have shape {expected}, got {tuple(tensor.shape)}")
