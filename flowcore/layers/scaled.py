"""Weights that are stored in 8 bits with a scale for each matrix."""

from collections.abc import Mapping

import torch
from torch import Tensor


def unscaled(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the true weights, those with a scale in bfloat16; scales of inputs are dropped."""
    result: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        layer, _, suffix = name.rpartition(".")
        if name == "scaled_fp8" or suffix in ("scale_weight", "scale_input"):
            continue
        scale = tensors.get(f"{layer}.scale_weight")
        if suffix == "weight" and scale is not None:
            result[name] = (tensor.float() * scale.float()).to(torch.bfloat16)
        else:
            result[name] = tensor
    return result
