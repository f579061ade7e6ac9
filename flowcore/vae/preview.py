"""Latents to a small picture without an autoencoder: one linear map per latent cell, fitted once."""

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional

from ..errors import ShapeError


def fit_rgb_factors(latents: Tensor, images: Tensor) -> tuple[list[list[float]], list[float]]:
    """Return the factors (one [r, g, b] per channel) and the bias [r, g, b] that map latents to colours best.

    Least squares over all latent cells; the colour of a cell is the mean of its pixels. ComfyUI shows such
    maps as live previews while a picture is sampled.
    Shapes: latents `b c h w` in model space; images `b 3 y x` in [-1, 1], y and x a multiple of h and w.
    Raises: ShapeError if the shapes do not fit each other, or if there are fewer cells than unknowns.
    """
    if images.ndim != 4 or images.shape[1] != 3 or latents.ndim != 4 or latents.shape[0] != images.shape[0]:
        raise ShapeError(
            "latents and images must be `b c h w` and `b 3 y x`, "
            f"got {tuple(latents.shape)} and {tuple(images.shape)}"
        )
    cells = rearrange(latents, "b c h w -> (b h w) c").double().cpu()
    if len(cells) <= latents.shape[1]:
        raise ShapeError(f"latent cells must be more than the {latents.shape[1]} channels, got {len(cells)}")
    small = functional.interpolate(images.double().cpu(), size=latents.shape[2:], mode="area")
    colours = rearrange(small, "b rgb h w -> (b h w) rgb")
    design = torch.cat([cells, torch.ones_like(cells[:, :1])], dim=1)
    solution = torch.linalg.lstsq(design, colours, driver="gelsd").solution  # (c + 1) 3
    rounded: list[list[float]] = [[round(value, 5) for value in row] for row in solution.tolist()]
    return rounded[:-1], rounded[-1]
