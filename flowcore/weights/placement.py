"""Where a module's weights are, and in which precision."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..lazy import outline


def move(module: nn.Module, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
    """Move a module in place; dtype is for its parameters alone, None = as they are.

    Buffers keep their dtype: rotary tables rounded to half precision give other states.
    """
    module.to(device=device)
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype=dtype)


def placed(
    tensors: Mapping[str, Tensor], dtypes: Mapping[str, torch.dtype], device: torch.device | str = "cpu"
) -> dict[str, Tensor]:
    """Return tensors on a device, in the dtypes named, else in their own.

    Those that stay as they are come last: they keep in memory what was mapped with them.
    """
    stored = {name: tensor.dtype for name, tensor in outline(tensors).items()}
    names = sorted(stored, key=lambda name: stored[name] == dtypes.get(name, stored[name]))
    return {name: tensors[name].to(device=device, dtype=dtypes.get(name)) for name in names}
