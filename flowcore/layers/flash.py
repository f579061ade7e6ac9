"""The attention product by flash-attn, which skips padding: hidden keys are left out before it starts.

Source: Dao 2023, arXiv:2307.08691; the package flash-attn, version 2.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional

MAX_HEAD_DIM = 256
MIN_CAPABILITY = (8, 0)


@dataclass(frozen=True, slots=True)
class Kernels:
    """flash-attn's two functions: for whole batches `b n nh e`, and for packed rows `(b n) nh e`."""

    plain: Callable[..., Tensor]
    packed: Callable[..., Tensor]


class PackedKeys(NamedTuple):
    """Which of `b m` keys are real, for packing them.

    places: where in `(b m)`. ends: 0, then where each sample ends among them, `b + 1` int32. longest:
    the most that a sample has.
    """

    places: Tensor
    ends: Tensor
    longest: int


@cache
def find_kernels() -> Kernels | str:
    """Return flash-attn's functions, or why there are none."""
    try:
        from flash_attn import flash_attn_func, flash_attn_varlen_func
    except ModuleNotFoundError:
        return "the package flash-attn is not installed"
    except ImportError as err:  # built for another torch
        return f"the package flash-attn does not load ({str(err).splitlines()[0]})"
    return Kernels(flash_attn_func, flash_attn_varlen_func)


def unfit(q: Tensor, bias: Tensor | None) -> str | None:
    """Return why flash-attn cannot compute an attention with these queries and bias; None = it can."""
    if q.device.type != "cuda":
        return f"it runs on CUDA devices, got {q.device.type}"
    if torch.cuda.get_device_capability(q.device) < MIN_CAPABILITY:
        return f"it needs compute capability 8.0, got {torch.cuda.get_device_capability(q.device)}"
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"it computes in bfloat16 and float16, got {q.dtype}"
    if q.shape[-1] > MAX_HEAD_DIM:
        return f"it takes heads of at most {MAX_HEAD_DIM} channels, got {q.shape[-1]}"
    if bias is not None and (bias.dtype != torch.bool or bias.shape[1:-1].numel() != 1):
        return f"it takes a boolean mask of keys, got {bias.dtype} of shape {tuple(bias.shape)}"
    return None


def flash(q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None, kernels: Kernels) -> Tensor:
    """Return the attention `b n (nh e)` of q `b nh n e` and k, v `b nh m e`.

    keep: `b 1 1 m` or `1 1 1 m` boolean, True = key to attend to. A sample without any gets zeros.
    """
    q, k, v = (part.transpose(1, 2) for part in (q, k, v))  # b n nh e
    if keep is None:
        return rearrange(kernels.plain(q, k, v), "b n nh e -> b n (nh e)")
    batch, length = q.shape[:2]
    packed = pack_keys(keep, batch)
    queries = torch.arange(batch + 1, dtype=torch.int32, device=q.device) * length
    k, v = (part.flatten(0, 1)[packed.places] for part in (k, v))
    mixed = kernels.packed(q.flatten(0, 1), k, v, queries, packed.ends, length, packed.longest)
    return rearrange(mixed, "(b n) nh e -> b n (nh e)", b=batch)


@lru_cache(maxsize=4)
def pack_keys(keep: Tensor, batch: int) -> PackedKeys:
    """Return how to pack the keys of a mask that broadcasts to `b 1 1 m`.

    Waits for the device, so the answer is kept: all blocks of a forward are given the same tensor.
    """
    real = keep.flatten(1).expand(batch, -1)
    counts = real.sum(dim=1, dtype=torch.int32)
    ends = functional.pad(counts.cumsum(0, dtype=torch.int32), (1, 0))
    return PackedKeys(real.flatten().nonzero()[:, 0], ends, int(counts.max()))
