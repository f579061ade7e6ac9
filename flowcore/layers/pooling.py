"""One vector for a row of tokens."""

import torch
from torch import Tensor


def masked_mean(tokens: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the mean of the real tokens, `b k` float32.

    Shapes: tokens `b m k`; mask `b m` boolean, True = real; None = all are.
    """
    if mask is None:
        return tokens.float().mean(dim=1)
    weights = mask / mask.sum(dim=1, keepdim=True).clamp_min(1)
    return torch.einsum("bm,bmk->bk", weights, tokens.float())
