"""Several processes that each hold the whole model and train on their part of every batch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from training.optim import OptimizerSet
from training.stop import StopFlag
from training.strategies.plain import Strategy

T = TypeVar("T")


class Rooted(nn.Module):
    """A module below one whose forward is any work with it, so that hooks of forward passes see all work."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, work: Callable[[], T]) -> T:
        """Return what work() gives."""
        return work()


class DataParallel(Strategy):
    """Gradients averaged by DistributedDataParallel of torch.

    Parameters that a step leaves unused are looked for, which also keeps torch from changing the order of its
    sums behind the first step: a resumed run sums as the one before.
    """

    name = "ddp"

    def enter(self, module: nn.Module, optimizers: OptimizerSet) -> None:
        """As `Strategy.enter`; what is averaged is what the stage trains."""
        del optimizers
        self._spread = DistributedDataParallel(Rooted(module), find_unused_parameters=True)

    def backward(self, work: Callable[[], Tensor], scaler: torch.amp.GradScaler, *, is_last: bool) -> Tensor:
        """As `Strategy.backward`."""
        alone: Any = contextlib.nullcontext() if is_last else self._spread.no_sync()
        with alone:
            return self._differentiated(self._spread(work), scaler)

    def sample(self, work: Callable[[Path, StopFlag], T], folder: Path, stop: StopFlag) -> T:
        """As `Strategy.sample`; the others wait."""
        return self.team.lead(lambda: work(folder, stop))
