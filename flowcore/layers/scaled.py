"""Weights that are stored in 8 bits with a scale for each matrix."""

from collections.abc import Mapping
from functools import partial
from operator import itemgetter

import torch
from torch import Tensor

from ..lazy import LazyTensors, Maker


def unscaled(tensors: Mapping[str, Tensor]) -> LazyTensors:
    """Return the true weights, those with a scale in bfloat16; scales of inputs are dropped."""
    makers: dict[str, Maker] = {}
    for name in tensors:
        layer, _, suffix = name.rpartition(".")
        if name == "scaled_fp8" or suffix in ("scale_weight", "scale_input"):
            continue
        scale = f"{layer}.scale_weight"
        has_scale = suffix == "weight" and scale in tensors
        makers[name] = partial(_true_weight, name, scale) if has_scale else itemgetter(name)
    return LazyTensors(tensors, makers)


def _true_weight(name: str, scale: str, tensors: Mapping[str, Tensor]) -> Tensor:
    return (tensors[name].float() * tensors[scale].float()).to(torch.bfloat16)
