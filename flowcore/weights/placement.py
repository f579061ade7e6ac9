"""Where a module's weights are, and in which precision."""

import torch
from torch import nn


def move(module: nn.Module, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
    """Move a module in place; dtype is for its parameters alone, None = as they are.

    Buffers keep their dtype: rotary tables rounded to half precision give other states.
    """
    module.to(device=device)
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype=dtype)
