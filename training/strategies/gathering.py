"""What strategies have in common whose processes hold parts of the model."""

from __future__ import annotations

import tempfile
from abc import abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

from torch import Tensor, distributed, nn

from training.stop import StopFlag
from training.strategies.data_parallel import Rooted
from training.strategies.plain import Strategy

T = TypeVar("T")


class Gathering(Strategy):
    """Weights that are whole for the moment of their use: all processes take part in all that uses them."""

    keeps_casts = False
    _root: Rooted

    @abstractmethod
    def whole(self, part: Tensor, parameter: Tensor | None) -> Tensor:
        """The tensor that this is the part of, belonging to a parameter if it does; work of all processes."""

    def full(self, parts: Mapping[str, Tensor], module: nn.Module) -> dict[str, Tensor]:
        """As `Strategy.full`, on the CPU, tensor by tensor."""
        parameters = dict(module.named_parameters())
        whole = {}
        for name, part in parts.items():
            tensor = self.whole(part, parameters.get(name))
            if self.team.is_first:
                whole[name] = tensor.cpu()
        return whole

    def sample(self, work: Callable[[Path, StopFlag], T], folder: Path, stop: StopFlag) -> T:
        """As `Strategy.sample`; all compute the same, and what the others write is thrown away."""
        with tempfile.TemporaryDirectory() as aside:
            place = folder if self.team.is_first else Path(aside)
            result: T = self._root(lambda: work(place, self.team.stop(stop)))
        return result


def ensure_group() -> None:
    """Makes a process that is alone a group by itself."""
    if not distributed.is_initialized():
        store = distributed.HashStore()  # type: ignore[attr-defined]  # is public
        distributed.init_process_group(store=store, rank=0, world_size=1)
