"""Exponential moving average of weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class Ema:
    """Float32 average of a module's trainable parameters: average <- d * average + (1 - d) * weights."""

    def __init__(
        self,
        module: nn.Module,
        decay: float,
        *,
        warmup: bool = False,
        local: Callable[[nn.Parameter], Tensor] = Tensor.detach,
    ) -> None:
        """Starts from the module's present weights; `decay` in (0, 1).

        With `warmup`, update n uses min(decay, (1 + n) / (10 + n)), so that the start is soon forgotten.
        `local` gives the part of a parameter that this process holds, in place; the average is of that part.
        """
        self.decay = decay
        self.warmup = warmup
        self.updates = 0
        self._local = local
        self._live = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.average: dict[str, Tensor] = {n: local(p).float().clone() for n, p in self._live.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Moves the average towards the weights once."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates)) if self.warmup else self.decay
        live = [self._local(p).float() for p in self._live.values()]
        torch._foreach_lerp_(list(self.average.values()), live, 1 - decay)
        self.updates += 1

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor], updates: int) -> None:
        """Puts back a saved average and its update counter."""
        for name, value in self.average.items():
            value.copy_(tensors[name])
        self.updates = updates

    @torch.no_grad()
    def swap(self) -> None:
        """Exchanges average and live weights in place; call twice around sampling."""
        for name, parameter in self._live.items():
            average, live = self.average[name], self._local(parameter)
            held = live.clone()
            live.copy_(average)
            average.copy_(held)
