"""One vector for a text."""

from einops import reduce
from torch import Tensor
from torch.nn import functional


def pool_states(states: Tensor, mask: Tensor) -> Tensor:
    """Return the mean of the states of real tokens, scaled to length 1, as one token `b 1 d`, float32.

    Shapes: states `b m d`; mask `b m` boolean, True = real token.
    """
    real = mask[..., None].float()
    mean = reduce(states.float() * real, "b m d -> b 1 d", "sum") / reduce(real, "b m one -> b 1 one", "sum")
    return functional.normalize(mean, dim=-1, eps=1e-8)
