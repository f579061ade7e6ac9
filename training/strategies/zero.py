"""ZeRO of deepspeed, an optional package: gradients and optimizer divided, at stage 3 the weights, too."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, distributed, nn

from training.optim import OptimizerSet
from training.strategies.data_parallel import Rooted
from training.strategies.gathering import Gathering, ensure_group
from training.team import Team


class Zero(Gathering):
    """A deepspeed engine, made for the first step or the optimizer's state; until then all is whole."""

    def __init__(self, team: Team, *, stage: int, is_offloaded: bool) -> None:
        super().__init__(team)
        self.name = f"zero{stage}"
        self.divides_weights, self.is_offloaded = stage == 3, is_offloaded
        self._started: Any = None

    def spread(self, module: nn.Module, device: torch.device) -> None:
        """As `Strategy.spread`."""
        self._root, self._device = Rooted(module), device

    def enter(self, module: nn.Module, optimizers: OptimizerSet) -> None:
        """As `Strategy.enter`, of a run that has one stage."""
        del module
        self._optimizers = optimizers

    @property
    def _engine(self) -> Any:  # noqa: ANN401 - of a package that need not be there
        if self._started is None:
            if self._device.type == "cpu":
                os.environ.setdefault("DS_ACCELERATOR", "cpu")
            ensure_group()
            import deepspeed

            deepspeed.init_distributed()
            waits = {"device": "cpu" if self.is_offloaded else "none"}
            zero = {"stage": 3, "offload_param": waits} if self.divides_weights else {"stage": 2}
            settings = {
                "train_micro_batch_size_per_gpu": 1,
                "zero_optimization": {**zero, "offload_optimizer": waits},
                "zero_allow_untested_optimizer": True,
                "zero_force_ds_cpu_optimizer": False,
            }
            self._started, *_ = deepspeed.initialize(
                model=self._root, optimizer=self._optimizers.optimizers[0], config=settings
            )
        return self._started

    def backward(self, work: Callable[[], Tensor], scaler: torch.amp.GradScaler, *, is_last: bool) -> Tensor:
        """As `Strategy.backward`."""
        del scaler
        self._engine.set_gradient_accumulation_boundary(is_last)
        loss: Tensor = self._engine(work)
        self._engine.backward(loss)
        return loss.detach()

    def update(
        self,
        module: nn.Module,
        optimizers: OptimizerSet,
        multiplier: float,
        scaler: torch.amp.GradScaler,
        limit: float,
    ) -> float:
        """As `Strategy.update`."""
        del module, scaler
        optimizers.set_rates(multiplier)
        zero = self._engine.optimizer
        zero.clip_grad = limit if math.isfinite(limit) else 0.0
        self._engine.step()
        return math.inf if zero.overflow else float(self._engine.get_global_grad_norm())

    def local(self, parameter: nn.Parameter) -> Tensor:
        """As `Strategy.local`; of weights that are to be divided, but are not yet, a copy."""
        if not self.divides_weights:
            return parameter.detach()
        part: Tensor | None = getattr(parameter, "ds_tensor", None)
        return self.shard(parameter.detach(), parameter) if part is None else part.detach()

    def state(self, module: nn.Module) -> dict[str, Tensor]:
        """As `Strategy.state`."""
        state = dict(module.state_dict())
        if self.divides_weights:
            state |= {name: self.local(parameter) for name, parameter in module.named_parameters()}
        return state

    def load(self, module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        """As `Strategy.load`, before there is an engine."""
        module.load_state_dict({**module.state_dict(), **tensors})

    def shard(self, whole: Tensor, parameter: Tensor) -> Tensor:
        """As `Strategy.shard`: equal parts of the values in a row, the last one filled up."""
        if not self.divides_weights:
            return whole
        del parameter
        length = -(-whole.numel() // self.team.size)
        row = whole.flatten()
        padded = nn.functional.pad(row, (0, length * self.team.size - len(row)))
        return padded[self.team.rank * length :][:length].clone()

    def whole(self, part: Tensor, parameter: Tensor | None) -> Tensor:
        """As `Gathering.whole`."""
        if not self.divides_weights or parameter is None:
            return part
        shape = getattr(parameter, "ds_shape", parameter.shape)
        rows = [torch.empty_like(part) for _ in range(self.team.size)]
        distributed.all_gather(rows, part.contiguous())
        return torch.cat(rows)[: math.prod(shape)].view(shape)

    def optimizer_state(self, module: nn.Module, optimizers: OptimizerSet) -> dict[str, Tensor]:
        """As `Strategy.optimizer_state`; all parameters have counted the same steps."""
        saved: dict[str, Any] = next(iter(optimizers.optimizers[0].state.values()), {})
        tensors: dict[str, Tensor] = {}
        for index, name in enumerate(optimizers.names[0] if saved else ()):
            parameter = module.get_parameter(name)
            for key, value in saved.items():
                is_divided = isinstance(value, Tensor) and value.ndim > 0
                whole = self._read(parameter, key) if is_divided else torch.as_tensor(value).clone()
                if self.team.is_first:
                    tensors[f"0.{index}.{key}"] = whole.cpu()
        return tensors

    def _read(self, parameter: nn.Parameter, key: str) -> Tensor:
        from deepspeed import utils

        if self.divides_weights:
            return self.whole(utils.safe_get_local_optimizer_state(parameter, key), parameter)
        whole: Tensor = utils.safe_get_full_optimizer_state(parameter, key)
        return whole

    def load_optimizer(self, module: nn.Module, optimizers: OptimizerSet, tensors: dict[str, Tensor]) -> None:
        """As `Strategy.load_optimizer`."""
        from deepspeed import utils

        zero, (optimizer,), (names,) = self._engine.optimizer, optimizers.optimizers, optimizers.names
        saved = {tuple(path.split(".", 2)): value for path, value in tensors.items()}
        if not {int(index) for _, index, _ in saved} <= set(range(len(names))):
            raise LookupError("an optimizer of other parameters")
        keys = {key: value for (_, _, key), value in saved.items()}
        counts = {key: value for key, value in keys.items() if not value.ndim}
        stage2, stage3 = "single_partition_of_fp32_groups", "fp32_partitioned_groups_flat"
        rows = getattr(zero, stage3 if self.divides_weights else stage2)
        for number, row in enumerate(rows):
            for key in keys:
                empty = torch.zeros_like(row) if key not in counts else counts[key].clone()
                optimizer.state[row][key] = empty
            if not self.divides_weights:
                utils.lazy_init_hp_params_optimizer_state(zero.bit16_groups[number], row, optimizer.state)
        for (_, index, key), value in saved.items():
            if not value.ndim:
                continue
            parameter = module.get_parameter(names[int(index)])
            if self.divides_weights:
                utils.safe_set_local_optimizer_state(parameter, self.shard(value, parameter), key)
            else:
                utils.safe_set_full_optimizer_state(parameter, value, key)
