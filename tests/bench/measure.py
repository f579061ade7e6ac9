"""Clocks, counters and the matrix product that speeds are compared with."""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from tests.bench.cases import PRODUCT_SIDE

_ATTENTION = "_scaled_dot_product"
"""Start of the names of torch's attentions, whose own counts do not know shared keys."""
_HIGH_WATER = Path("/proc/self/clear_refs")


def timed(call: Callable[[], object], device: str) -> float:
    """Seconds that a call takes: of the processor on a CPU, of the clock on a GPU.

    Processor time of one thread is what the call would take on an idle machine; other work does not count.
    """
    if device == "cpu":
        start = time.process_time()
        call()
        return time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def square_product(dtype: str, device: str) -> Callable[[], Tensor]:
    """The product of two square matrices of PRODUCT_SIDE, as often as a GPU needs to be busy with it."""
    left, right = (
        torch.randn(PRODUCT_SIDE, PRODUCT_SIDE, device=device, dtype=getattr(torch, dtype)) for _ in range(2)
    )
    return lambda: left @ right


def count_gflop(call: Callable[[], object]) -> float:
    """10^9 floating-point operations of the matrix products, convolutions and attentions of a call."""
    kinds = [f"{_ATTENTION}_{kind}_attention" for kind in ("flash", "efficient", "cudnn")]

    def forward(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:  # noqa: ANN401
        return sdpa_flop_count(q, for_heads(q, k), for_heads(q, v))

    def backward(grad: Any, q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:  # noqa: ANN401
        return sdpa_backward_flop_count(grad, q, for_heads(q, k), for_heads(q, v))

    own = {
        getattr(torch.ops.aten, name + ending): function
        for name in (*kinds, f"{_ATTENTION}_flash_attention_for_cpu")
        for ending, function in (("", forward), ("_backward", backward))
    }
    with FlopCounterMode(display=False, custom_mapping=own) as counter:
        call()
    return counter.get_total_flops() / 1e9


def for_heads(queries: Any, shared: Any) -> tuple[int, ...]:  # noqa: ANN401
    """The shape of keys or values `b h n e`, repeated for all queries that share them."""
    return (shared[0], queries[1], *shared[2:])


def reset_peak(device: str) -> None:
    """Start the measurement of the memory peak anew, on systems that can."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    elif _HIGH_WATER.exists():
        _HIGH_WATER.write_text("5", encoding="ascii")


def peak_mib(device: str) -> float:
    """Most memory in use since `reset_peak`, MiB: of the GPU's allocator, or resident in the process."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated() / 2**20
    if _HIGH_WATER.exists():
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) / 2**10 for line in lines if line.startswith("VmHWM"))
    import resource

    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
