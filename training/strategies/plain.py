"""One process that holds everything: what the other strategies change."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn

from training.optim import OptimizerSet
from training.stop import StopFlag
from training.team import Team

T = TypeVar("T")


@runtime_checkable
class Refers(Protocol):
    """A module that uses a network whose weights belong to files of their own."""

    def own_state(self) -> dict[str, Tensor]:
        """The tensors that are not the other network's."""


def own_state(module: nn.Module) -> dict[str, Tensor]:
    """The tensors of a module that a checkpoint holds."""
    return module.own_state() if isinstance(module, Refers) else module.state_dict()


class Strategy:
    """Gradients, updates and state of a model that one process trains alone.

    Attributes:
        name: as in run.json.
        team: the processes.
        keeps_casts: whether autocast may keep weights in half precision from one use to the next.
    """

    name = "none"
    keeps_casts = True

    def __init__(self, team: Team) -> None:
        self.team = team

    def spread(self, module: nn.Module, device: torch.device) -> None:
        """Takes a module, once, whose parameters that some stage trains require gradients."""

    def enter(self, module: nn.Module, optimizers: OptimizerSet) -> None:
        """Begins a stage: its parameters alone require gradients, and the optimizers have them."""

    def backward(self, work: Callable[[], Tensor], scaler: torch.amp.GradScaler, *, is_last: bool) -> Tensor:
        """Adds the gradients of the number that `work` gives, and returns it.

        Behind the last one of a step, gradients are the means over the processes.
        """
        del is_last
        return self._differentiated(work(), scaler)

    def _differentiated(self, loss: Tensor, scaler: torch.amp.GradScaler) -> Tensor:
        torch.autograd.backward(scaler.scale(loss))
        return loss.detach()

    def update(
        self,
        module: nn.Module,
        optimizers: OptimizerSet,
        multiplier: float,
        scaler: torch.amp.GradScaler,
        limit: float,
    ) -> float:
        """One update of the weights at `multiplier` times each group's learning rate.

        Returns the norm of the gradient before it was cut to `limit`; without a scaler, there is no update if
        that is not finite.
        """
        for optimizer in optimizers.optimizers:
            scaler.unscale_(optimizer)
        norm = self._clip(module, limit)
        if math.isfinite(norm) or scaler.is_enabled():
            optimizers.step(multiplier, scaler)
        return norm

    def _clip(self, module: nn.Module, limit: float) -> float:
        return float(nn.utils.clip_grad_norm_(module.parameters(), limit))

    def local(self, parameter: nn.Parameter) -> Tensor:
        """The part of a parameter that this process holds, in place."""
        return parameter.detach()

    def state(self, module: nn.Module) -> dict[str, Tensor]:
        """The parts of a module's tensors that this process holds, by name."""
        return dict(module.state_dict())

    def load(self, module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        """Puts whole tensors into a module. Raises: RuntimeError for other shapes."""
        state = module.state_dict()
        held = {name: self.shard(tensor, state[name]) for name, tensor in tensors.items()}
        module.load_state_dict({**state, **held})

    def optimizer_state(self, module: nn.Module, optimizers: OptimizerSet) -> dict[str, Tensor]:
        """The whole state of the optimizers; in the first process alone if it is spread."""
        return self.full(optimizers.state_tensors(), module)

    def load_optimizer(self, module: nn.Module, optimizers: OptimizerSet, tensors: dict[str, Tensor]) -> None:
        """Puts back what `optimizer_state` gave. Raises: LookupError, ValueError if it is of others."""
        del module
        optimizers.load_state_tensors(tensors, self.shard)

    def full(self, parts: Mapping[str, Tensor], module: nn.Module) -> dict[str, Tensor]:  # noqa: ARG002 - others
        """The whole tensors of which these are the parts, by name; in the first process alone."""
        return dict(parts)

    def shard(self, whole: Tensor, parameter: Tensor) -> Tensor:  # noqa: ARG002 - as above
        """The part of a tensor of a parameter's shape that this process holds."""
        return whole

    def sample(self, work: Callable[[Path, StopFlag], T], folder: Path, stop: StopFlag) -> T:
        """What `work`, which writes to a folder, gives of the model, without gradients."""
        return work(folder, stop)
