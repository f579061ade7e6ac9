"""The JAX port's tensors under the names and in the axes of the reference, and the arithmetic that they need.

Source: MK040412/Ouroboros, src/xut (flax.nnx).
"""

import re
from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...lazy import LazyTensors

JAX_SETTINGS: Mapping[str, Any] = {"residual": "prenorm", "skip_source": "self", "ln_eps": 1e-6}
"""Configuration fields under which a converted model computes what the port computes."""

_NO_ROTATION = -1e4
"""The exponential of this log frequency is exactly 0."""

_RENAMED = (
    (r"\benc_stacks\b", "enc_blocks"),
    (r"\bdec_stacks\b", "dec_blocks"),
    (r"\bsa_pre\b", "attn_pre_norm"),
    (r"\bxa_pre\b", "xattn_pre_norm"),
    (r"\bmlp_pre\b", "mlp_pre_norm"),
    (r"\bsa\b", "attn"),
    (r"\bxa\b", "xattn"),
    (r"\bout_patch\.linear\b", "out_patch.proj"),
    (r"\b(time|r)_emb\.proj\b", r"\1_emb.proj.0"),
    (r"\b(shared_adaln_\w+)\.norm\b", r"\1.0"),
    (r"\b(shared_adaln_\w+)\.fc1\b", r"\1.1"),
    (r"\b(shared_adaln_\w+)\.fc2\b", r"\1.3"),
    (r"\baddon_info_embs_proj_1\b", "addon_info_embs_proj.0"),
    (r"\baddon_info_embs_proj_2\b", "addon_info_embs_proj.2"),
    (r"\blog_freqs$", "freqs"),
    (r"\.(kernel|scale|embedding)$", ".weight"),
)


def is_jax(keys: Collection[str]) -> bool:
    """Return whether the names are those of the JAX port."""
    return "backbone.enc_stacks.0.0.sa.qkv.kernel" in keys


def jax_to_reference(tensors: Mapping[str, Tensor]) -> LazyTensors:
    """Return the port's tensors as the reference names and lays them out.

    The port turns only the first four channels of a head, all by one frequency: here the further frequencies
    are zero. Exact for inference; in training those frequencies receive no gradient.
    """
    dim = tensors["in_patch.proj.kernel"].shape[-1]
    heads = next(t.shape[0] for name, t in tensors.items() if name.endswith(".rope.log_freqs"))
    return LazyTensors(tensors, {_rename(name): partial(_convert, name, dim // heads) for name in tensors})


def _rename(name: str) -> str:
    for pattern, replacement in _RENAMED:
        name = re.sub(pattern, replacement, name)
    return name


def _convert(name: str, dim_head: int, tensors: Mapping[str, Tensor]) -> Tensor:
    tensor = tensors[name]
    if name == "in_patch.proj.kernel":
        return tensor.permute(3, 2, 0, 1).contiguous()
    if name.endswith(".kernel"):
        return tensor.T.contiguous()
    if name.endswith(".rope.log_freqs"):
        freqs = tensor.new_full((tensor.shape[0], dim_head // 4, 2), _NO_ROTATION, dtype=torch.float32)
        freqs[:, 0, :] = tensor.reshape(-1, 1)
        return freqs
    return tensor
