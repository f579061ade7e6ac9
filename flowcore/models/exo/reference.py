"""The four parts of the original ExoT2I code that run, and its loss, for comparison alone.

Outputs of the diffusion head and the projector have channels last, as there.
Source: the published ExoT2I code, model.py, vision_projector.py, training.py.
"""

from typing import NamedTuple

from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

MASK_WEIGHT = 0.1
"""Of the mean magnitude of mask logits inside the edit term."""


class PooledDiffusionHead(nn.Module):
    """The whole image from the mean of all tokens."""

    def __init__(self, dim: int, channels: int, size: int) -> None:
        super().__init__()
        self.size = size
        self.proj = nn.Linear(dim, size * size * channels)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return `b h w c` of states `b n d`."""
        result: Tensor = self.proj(hidden.mean(dim=1))
        return rearrange(result, "b (h w c) -> b h w c", h=self.size, w=self.size)


class PooledEditHead(nn.Module):
    """Mask logits from the last token; one vector for every selected cell from the mean of all."""

    def __init__(self, dim: int, delta_dim: int, size: int) -> None:
        super().__init__()
        self.size = size
        self.mask_proj = nn.Linear(dim, size * size)
        self.delta_proj = nn.Linear(dim, delta_dim)

    def forward(self, hidden: Tensor, num_selected: int | None = None) -> tuple[Tensor, Tensor]:
        """Return mask logits `b h w` and deltas `b s k`; num_selected None = all cells."""
        mask = rearrange(self.mask_proj(hidden[:, -1]), "b (h w) -> b h w", h=self.size)
        delta = self.delta_proj(hidden).mean(dim=1, keepdim=True)
        return mask, delta.expand(-1, num_selected or self.size**2, -1)


class LatentCrossAttention(nn.Module):
    """Attention of all tokens to the latents, without norm, position, gate or residual."""

    def __init__(self, dim: int, channels: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q_proj = nn.Linear(dim, dim)
        self.k_proj = nn.Linear(channels, dim)
        self.v_proj = nn.Linear(channels, dim)
        self.out_proj = nn.Linear(dim, dim)

    def forward(self, hidden: Tensor, latents: Tensor) -> Tensor:
        """Return `b n d` of states `b n d` and latents `b h w c`."""
        cells = latents.flatten(1, 2)
        q, k, v = (
            rearrange(part, "b n (nh e) -> b nh n e", nh=self.num_heads)
            for part in (self.q_proj(hidden), self.k_proj(cells), self.v_proj(cells))
        )
        mixed = functional.scaled_dot_product_attention(q, k, v)
        result: Tensor = self.out_proj(rearrange(mixed, "b nh n e -> b n (nh e)"))
        return result


class ConvolutionalProjector(nn.Module):
    """From a square grid of visual tokens to latents."""

    def __init__(self, dim: int, channels: int, size: int, *, widths: tuple[int, int] = (512, 256)) -> None:
        super().__init__()
        self.size = size
        self.conv1 = nn.Conv2d(dim, widths[0], 3, padding=1)
        self.norm1 = nn.LayerNorm(widths[0])
        self.conv2 = nn.Conv2d(widths[0], widths[1], 3, padding=1)
        self.norm2 = nn.LayerNorm(widths[1])
        self.conv3 = nn.Conv2d(widths[1], channels, 3, padding=1)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return `b h w c` of visual tokens `b n d`."""
        x = rearrange(tokens, "b (h w) d -> b d h w", h=round(tokens.shape[1] ** 0.5))
        for conv, norm in ((self.conv1, self.norm1), (self.conv2, self.norm2)):
            x = norm(conv(x).relu().movedim(1, -1)).movedim(-1, 1)
        x = functional.interpolate(x, size=(self.size, self.size), mode="bilinear", align_corners=False)
        result: Tensor = self.conv3(x)
        return result.movedim(1, -1)


class SourceLoss(NamedTuple):
    """The terms that can be computed, unweighted, and their weighted sum."""

    diffusion: Tensor
    mask: Tensor
    total: Tensor


def source_loss(
    predicted: Tensor, target: Tensor, mask: Tensor, weights: tuple[float, float] = (0.9, 0.1)
) -> SourceLoss:
    """Return the original's loss without its perceptual term, which cannot be computed.

    Shapes: predicted and target of one shape; mask: logits of any shape; weights of the two terms.
    """
    diffusion = functional.mse_loss(predicted, target)
    magnitude = mask.abs().mean()
    return SourceLoss(diffusion, magnitude, weights[0] * diffusion + weights[1] * MASK_WEIGHT * magnitude)
