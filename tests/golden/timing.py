"""Seconds and memory of a forward."""

import resource
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Timing(NamedTuple):
    """Medians in seconds, and the peak of the device's memory, on the CPU of the whole process, in MiB."""

    seconds: float
    backward_seconds: float | None
    peak_mib: float


def time_forward(forward: Callable[[], Tensor], count: int, device: str, has_backward: bool) -> Timing:
    """The medians of `count` forwards, and of as many with a backward pass, after one of each to warm up."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()

    def plain() -> None:
        with torch.no_grad():
            forward()

    seconds = _median(plain, count, device)
    backward_seconds = (
        _median(lambda: forward().float().sum().backward(), count, device) if has_backward else None
    )
    if device == "cuda":
        peak = torch.cuda.max_memory_allocated() / 2**20
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    return Timing(seconds, backward_seconds, peak)


def _median(call: Callable[[], None], count: int, device: str) -> float:
    call()
    times = []
    for _ in range(count):
        _wait(device)
        start = time.perf_counter()
        call()
        _wait(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
