"""The border check of SingleStreamDiT's inputs: once a call, nothing inside the blocks."""

from torch import Tensor

from ...errors import ShapeError
from .config import SingleStreamConfig


def check_inputs(
    config: SingleStreamConfig, x: Tensor, t: Tensor, text_embeds: Tensor | None, text_mask: Tensor | None
) -> None:
    """Check latents and conditions against the configuration.

    Raises: ShapeError that names the input, the shape it must have, and the one it has.
    """
    if x.ndim != 4 or x.shape[1] != config.in_channels:
        raise ShapeError(f"latents must be b {config.in_channels} h w, got {tuple(x.shape)}")
    for name, side in zip(("height", "width"), x.shape[-2:], strict=True):
        _check_side(config, f"{name} of the latents", side)
    batch = x.shape[0]
    if t.numel() != batch:
        raise ShapeError(f"times must be one for each of {batch} samples, got {tuple(t.shape)}")
    if text_embeds is not None:
        _check_text(config, text_embeds, batch)
    if text_mask is not None:
        _check_mask(text_embeds, text_mask)


def _check_side(config: SingleStreamConfig, name: str, side: int) -> None:
    patch, least = config.patch_size, config.patch_size * config.least_side
    if side % patch:
        low, high = side // patch * patch, (side // patch + 1) * patch
        raise ShapeError(f"{name} must be a multiple of {patch}, got {side}; nearest are {low} and {high}")
    if side < least:
        raise ShapeError(f"{name} must be at least {least}, got {side}")


def _check_text(config: SingleStreamConfig, text: Tensor, batch: int) -> None:
    if text.ndim != 3 or text.shape[0] != batch or text.shape[2] != config.text_embed_dim:
        raise ShapeError(f"text_embeds must be {batch} m {config.text_embed_dim}, got {tuple(text.shape)}")
    if not 1 <= text.shape[1] <= config.max_token_length:
        raise ShapeError(
            f"text_embeds must have 1 to {config.max_token_length} tokens, got {text.shape[1]}; "
            "prompts cannot be joined or repeated beyond that"
        )


def _check_mask(text: Tensor | None, mask: Tensor) -> None:
    if text is None:
        raise ShapeError("text_mask must come with text_embeds, got text_embeds None")
    if mask.is_floating_point() or mask.shape != text.shape[:2]:
        raise ShapeError(
            f"text_mask must be boolean {tuple(text.shape[:2])}, got {tuple(mask.shape)} {mask.dtype}"
        )
