"""Optimizers, parameter groups and learning-rate curves."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flowcore.errors import ConfigError
from training.config import Group, Optimizer


def base_lr(config: Optimizer) -> float:
    """The learning rate of parameters that no group gives one of its own."""
    if config.lr_profile == "reference" and config.reference_lr is not None:
        return config.reference_lr
    return config.lr


def fan_in(shape: Sequence[int]) -> int:
    """Inputs that one output of a parameter sums over: all axes but the first, all of them for vectors.

    Source: the muP rule of HDM, github.com/KohakuBlueleaf/HDM: learning rate = base / fan_in.
    """
    return math.prod(shape) if len(shape) < 2 else math.prod(shape[1:])


def lr_multiplier(
    name: str, step: int, *, steps: int, warmup_steps: int = 0, minimum: float = 0.0, warmup: str = "linear"
) -> float:
    """Factor on every learning rate at `step` (from 0), after a warm-up, of a curve of `steps` steps.

    constant stays at 1; linear and cosine fall to `minimum` at `steps` and stay there. The warm-up rises from
    0 in a straight line, or with warmup `cosine` in half a wave.
    """
    if step < warmup_steps:
        share = step / warmup_steps
        return 0.5 * (1 - math.cos(math.pi * share)) if warmup == "cosine" else share
    if name == "constant":
        return 1.0
    length = steps - warmup_steps
    done = step - warmup_steps
    if done >= length:
        return minimum
    share = done / length
    fall = 0.5 * (1 + math.cos(math.pi * share)) if name == "cosine" else 1 - share
    return minimum + (1 - minimum) * fall


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupPlan:
    """Parameters that share an optimizer, a learning rate and a weight decay."""

    optimizer: str
    lr: float
    weight_decay: float
    names: tuple[str, ...]


def plan_groups(parameters: Iterable[tuple[str, Tensor]], config: Optimizer) -> list[GroupPlan]:
    """Groups of trainable parameters by the first matching pattern, in a stable order.

    Raises: ConfigError if a pattern matches nothing, or Muon would get a parameter that is not a matrix.
    """
    matched: set[str] = set()
    plans: dict[tuple[str, float, float], list[str]] = {}
    for name, parameter in parameters:
        group = next((g for g in config.groups if re.search(g.pattern, name)), None)
        if group:
            matched.add(group.pattern)
        plans.setdefault(_settings(name, parameter, group, config), []).append(name)
    unmatched = [g.pattern for g in config.groups if g.pattern not in matched]
    if unmatched:
        raise ConfigError(f"optimizer.groups: pattern must match a trainable parameter, got {unmatched[0]!r}")
    return [
        GroupPlan(optimizer=kind, lr=lr, weight_decay=decay, names=tuple(names))
        for (kind, lr, decay), names in plans.items()
    ]


def _settings(
    name: str, parameter: Tensor, group: Group | None, config: Optimizer
) -> tuple[str, float, float]:
    """Optimizer, learning rate and weight decay of one parameter."""
    values: dict[str, Any] = {
        key: own if (own := getattr(group, key, None)) is not None else getattr(config, key)
        for key in ("name", "lr", "rule", "weight_decay")
    }
    if config.lr_profile == "reference":
        values["lr"] = base_lr(config)
    if values["name"] == "muon" and parameter.ndim != 2:
        raise ConfigError(
            f"optimizer.groups: muon takes matrices only, got {name} of shape {tuple(parameter.shape)}; "
            "add a group with name adamw whose pattern matches it"
        )
    lr = values["lr"] / fan_in(parameter.shape) if values["rule"] == "fan_in" else values["lr"]
    return values["name"], lr, values["weight_decay"]


class OptimizerSet:
    """The torch optimizers of a run, driven by one learning-rate multiplier."""

    def __init__(self, module: nn.Module, config: Optimizer) -> None:
        """Groups `module`'s trainable parameters and builds one optimizer per kind.

        Raises: ConfigError as `plan_groups`, or if this torch has no Muon.
        """
        named = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.plans = plan_groups(named.items(), config)
        self.optimizers: list[torch.optim.Optimizer] = []
        for kind in dict.fromkeys(plan.optimizer for plan in self.plans):
            groups = [
                {
                    "params": [named[n] for n in p.names],
                    "lr": p.lr,
                    "weight_decay": p.weight_decay,
                    "base_lr": p.lr,
                }
                for p in self.plans
                if p.optimizer == kind
            ]
            self.optimizers.append(_build(kind, groups, config.betas))

    @property
    def names(self) -> list[list[str]]:
        """Names of the parameters of each optimizer, in the order in which its state counts them."""
        kinds = dict.fromkeys(plan.optimizer for plan in self.plans)
        return [[n for plan in self.plans if plan.optimizer == kind for n in plan.names] for kind in kinds]

    def set_rates(self, multiplier: float) -> None:
        """Sets each group's learning rate to `multiplier` times its own."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["base_lr"] * multiplier

    def step(self, multiplier: float, scaler: torch.amp.GradScaler) -> None:
        """One update at `multiplier` times each group's learning rate; clears the gradients."""
        self.set_rates(multiplier)
        for optimizer in self.optimizers:
            scaler.step(optimizer)
            optimizer.zero_grad(set_to_none=True)
        scaler.update()

    def state_tensors(self) -> dict[str, Tensor]:
        """Optimizer state as named tensors: `<optimizer>.<parameter number>.<name>`."""
        return {
            f"{number}.{index}.{name}": torch.as_tensor(value)
            for number, optimizer in enumerate(self.optimizers)
            for index, state in optimizer.state_dict()["state"].items()
            for name, value in state.items()
            if value is not None
        }

    def load_state_tensors(
        self, tensors: dict[str, Tensor], shard: Callable[[Tensor, Tensor], Tensor]
    ) -> None:
        """Puts back what `state_tensors` gave; group settings stay those of the configuration.

        shard: (tensor of a parameter's shape, the parameter) -> the part of it that this process holds.

        Raises: LookupError, ValueError if the tensors are those of other parameters or optimizers.
        """
        parameters = [[p for g in o.param_groups for p in g["params"]] for o in self.optimizers]
        states: list[dict[int, dict[str, Tensor]]] = [{} for _ in self.optimizers]
        for path, value in tensors.items():
            number, index, name = path.split(".", 2)
            parameter = parameters[int(number)][int(index)]
            if value.ndim and value.shape != parameter.shape:
                raise ValueError(
                    f"{path} of shape {tuple(value.shape)} for a parameter of {tuple(parameter.shape)}"
                )
            held = shard(value, parameter) if value.ndim else value
            states[int(number)].setdefault(int(index), {})[name] = held
        for optimizer, state in zip(self.optimizers, states, strict=True):
            optimizer.load_state_dict(
                {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}
            )


def _build(kind: str, groups: list[dict[str, Any]], betas: tuple[float, float]) -> torch.optim.Optimizer:
    if kind == "adamw":
        return torch.optim.AdamW(groups, betas=betas, eps=1e-8, fused=True)
    if kind == "sgd":
        return torch.optim.SGD(groups, momentum=betas[0])
    if not hasattr(torch.optim, "Muon"):
        raise ConfigError(
            f"optimizer.name: muon needs torch 2.9 or newer, got {torch.__version__}; use adamw"
        )
    return torch.optim.Muon(groups, momentum=0.95, nesterov=True)
