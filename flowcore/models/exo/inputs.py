"""Checks of what a caller hands to Exo."""

from torch import Tensor

from ...errors import ShapeError
from .config import ExoConfig
from .trunk_config import MERGE


def check_latents(config: ExoConfig, z: Tensor, t: Tensor, batch: int, size: tuple[int, int]) -> None:
    """Check noised latents and times against the prompts. Raises: ShapeError."""
    if z.ndim != 4 or z.shape[1] != config.latent_channels or 0 in z.shape:
        raise ShapeError(f"z must be `b {config.latent_channels} h w`, got {tuple(z.shape)}")
    if tuple(z.shape[-2:]) != size:
        raise ShapeError(
            f"z must have the size {size} that its prompt was encoded for, got {tuple(z.shape[-2:])}"
        )
    if z.shape[0] != batch or t.shape != (batch,):
        raise ShapeError(
            f"z and t must have the batch {batch} of the prompts, got {z.shape[0]} and shape {tuple(t.shape)}"
        )


def check_prompt(
    token_ids: Tensor, mask: Tensor, is_image: Tensor, pixels: Tensor | None, grids: Tensor | None
) -> None:
    """Check token ids and their mask `b m` against the pictures; nothing on the device "meta".

    Raises: ShapeError.
    """
    if token_ids.is_meta:
        return
    if token_ids.ndim != 2 or token_ids.is_floating_point() or mask.shape != token_ids.shape:
        raise ShapeError(
            f"token_ids must be whole numbers `b m` with a mask of the same shape, got {token_ids.dtype} "
            f"{tuple(token_ids.shape)} and {tuple(mask.shape)}"
        )
    if not bool(mask[:, 0].all()) or bool((mask[:, 1:] & ~mask[:, :-1]).any()):
        raise ShapeError(
            "token_mask must be True on the first tokens of each prompt, got gaps; pad at the right"
        )
    if (pixels is None) != (grids is None):
        raise ShapeError("pixels and grids must be given together, got one of them")
    counts = is_image.sum(dim=1)
    with_image = int((counts > 0).sum())
    if pixels is None or grids is None:
        if with_image:
            raise ShapeError(f"prompts with image tokens must come with pixels, got {with_image} without")
        return
    if pixels.ndim != 3 or grids.shape != (pixels.shape[0], 3) or pixels.shape[0] != with_image:
        raise ShapeError(
            f"pixels must be `i n k` and grids `i 3` for the {with_image} prompts with image tokens, got "
            f"{tuple(pixels.shape)} and {tuple(grids.shape)}"
        )
    needed = pixels.shape[1] // MERGE**2
    if not bool(((counts == 0) | (counts == needed)).all()):
        raise ShapeError(
            f"a prompt must have an image token for each of its picture's {needed} visual tokens, got "
            f"{counts.tolist()}"
        )
