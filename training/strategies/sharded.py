"""Several processes that each hold a part of every parameter, by `fully_shard` of torch (FSDP2)."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from flowcore.errors import ConfigError
from flowcore.models.exo import Exo
from training.stop import StopFlag
from training.strategies.data_parallel import Rooted
from training.strategies.gathering import Gathering, ensure_group
from training.team import Team

T = TypeVar("T")


class Sharded(Gathering):
    """Parameters, gradients, optimizer and average divided by the processes.

    A block is gathered when it is called and let go behind it; what belongs to no block stays gathered for a
    step. Weights in half precision are not kept, for they would be whole.
    """

    name = "fsdp2"

    def __init__(self, team: Team, *, is_offloaded: bool) -> None:
        super().__init__(team)
        self.is_offloaded = is_offloaded

    def spread(self, module: nn.Module, device: torch.device) -> None:
        """As `Strategy.spread`. Raises: ConfigError for parameters that cannot be divided."""
        scalar = next((name for name, p in module.named_parameters() if not p.ndim), None)
        if scalar:
            raise ConfigError(
                f"distributed.strategy must be none or ddp for this model, whose {scalar} is a "
                "single number, got fsdp2"
            )
        self._root = Rooted(module)
        options: dict[str, Any] = {"mesh": _mesh(self.team, device)}
        if self.is_offloaded:
            options["offload_policy"] = CPUOffloadPolicy(pin_memory=device.type == "cuda")
        self._units: list[Any] = [fully_shard(unit, **options) for unit in (*_units(module), self._root)]

    def backward(self, work: Callable[[], Tensor], scaler: torch.amp.GradScaler, *, is_last: bool) -> Tensor:
        """As `Strategy.backward`; gradients are averaged and divided after every part of a step."""
        del is_last
        with _without_view_warning():
            loss = self._differentiated(self._root(work), scaler)
        self._let_go()
        return loss

    def _let_go(self) -> None:
        """Drops whole weights that would be stale behind the step.

        They are left by blocks that a checkpoint computed again without need of their gradients, and by what
        is no block after a forward pass alone.
        """
        for unit in self._units:
            unit.reshard()

    def _clip(self, module: nn.Module, limit: float) -> float:
        """The norm of all parts from the norm of each process's."""
        own = [p.grad.to_local() for p in module.parameters() if isinstance(p.grad, DTensor)]
        square = nn.utils.get_total_norm(own).square()
        distributed.all_reduce(square)
        norm = square.sqrt()
        torch._foreach_mul_(own, (limit / (norm + 1e-6)).clamp(max=1.0))
        return float(norm)

    def whole(self, part: Tensor, parameter: Tensor | None) -> Tensor:
        """As `Gathering.whole`."""
        del parameter
        return part.full_tensor() if isinstance(part, DTensor) else part

    def shard(self, whole: Tensor, parameter: Tensor) -> Tensor:
        """As `Strategy.shard`."""
        if not isinstance(parameter, DTensor):
            return whole
        mesh = parameter.device_mesh
        placed = distribute_tensor(whole.to(mesh.device_type), mesh, parameter.placements, src_data_rank=None)
        return placed.to(parameter.device)

    def sample(self, work: Callable[[Path, StopFlag], T], folder: Path, stop: StopFlag) -> T:
        """As `Strategy.sample`."""
        result = super().sample(work, folder, stop)
        self._let_go()
        return result


@contextlib.contextmanager
def _without_view_warning() -> Iterator[None]:
    """Linear layers return views here; torch warns of changes in place, of which no model makes any."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module", category=UserWarning)
        yield


def _mesh(team: Team, device: torch.device) -> DeviceMesh:
    """All processes in a row; one alone is a group by itself."""
    ensure_group()
    return init_device_mesh(device.type, (team.size,))


def _units(module: nn.Module) -> Iterator[nn.Module]:
    """What is gathered together: blocks, which are called whole.

    Exo calls parts of blocks, its own and those of the trunk's library, so that hooks of blocks would not
    run: there it is every linear layer.
    """
    if isinstance(module, Exo):
        yield from (part for part in module.modules() if isinstance(part, nn.Linear))
        return
    for row in module.modules():
        if isinstance(row, nn.ModuleList):
            yield from (block for block in row if not isinstance(block, nn.ModuleList))
