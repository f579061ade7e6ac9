"""The stages of a run: what changes, at which rates, and from which step to which.

Every stage begins with an optimizer of its own without any state, and its learning rate follows a curve from
the stage's first step; the data order, the step count and the average of the weights run on.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from flowcore.errors import ConfigError
from training.config import ConfigT, LoopConfig, RunConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """Steps `first` to `last` (exclusive) of a run, from 0, and the configuration that holds for them."""

    name: str
    first: int
    last: int
    config: LoopConfig


def stages_of(config: LoopConfig) -> tuple[Stage, ...]:
    """The stages of a run, one where none are named. Lengths in epochs must be resolved."""
    if not isinstance(config, RunConfig) or not config.train.stages:
        return (Stage(name="", first=0, last=config.train.steps, config=config),)
    stages: list[Stage] = []
    for number, table in enumerate(config.train.stages):
        first = stages[-1].last if stages else 0
        last = first + table.steps
        stages.append(Stage(name=table.name, first=first, last=last, config=config.stage(number)))
    return tuple(stages)


def tables_of(config: RunConfig) -> list[RunConfig]:
    """What holds for a run, and for each of its stages, whose lengths need not be known."""
    return [config, *(config.stage(number) for number in range(len(config.train.stages)))]


def teachers_of(config: RunConfig) -> list[str]:
    """Names of the teachers of a run and of its stages."""
    return list(dict.fromkeys(name for table in tables_of(config) for name in table.train.teachers))


def stage_at(stages: Sequence[Stage], step: int) -> int:
    """Number of the stage that a step (from 0) lies in; the last one for steps behind it."""
    return next((number for number, stage in enumerate(stages) if step < stage.last), len(stages) - 1)


def resolve_length(config: RunConfig, images: int) -> RunConfig:
    """The configuration with `train.steps`, and the steps of stages, that its epochs over so many images are.

    Raises: ConfigError if steps that are given as well differ.
    """
    train = config.train
    if not train.stages and train.epochs is None:
        return config
    lengths = [
        _steps(stage.epochs, images, config.stage(number).train.batch_size) if stage.epochs else stage.steps
        for number, stage in enumerate(train.stages)
    ]
    if train.epochs is not None:
        lengths = [_steps(train.epochs, images, train.batch_size)]
    if "steps" in train.model_fields_set and train.steps != sum(lengths):
        source = "stages" if train.stages else "epochs"
        raise ConfigError(
            f"train.steps must be the {sum(lengths)} steps of train.{source}, got {train.steps}; leave it out"
        )
    return with_lengths(config, lengths)


def with_lengths(config: ConfigT, lengths: Sequence[int]) -> ConfigT:
    """The configuration with so many steps in each stage, or in the whole if there is one."""
    stages = tuple(
        stage.model_copy(update={"steps": steps})
        for stage, steps in zip(config.train.stages, lengths, strict=False)
    )
    train = config.train.model_copy(update={"steps": sum(lengths), "stages": stages})
    return config.model_copy(update={"train": train})


def _steps(epochs: float, images: int, batch_size: int) -> int:
    return max(1, math.ceil(epochs * images / batch_size))


def warmup_steps(config: LoopConfig) -> int:
    """Steps of the warm-up of a run, or of a stage by itself."""
    schedule = config.schedule
    if schedule.warmup_share is None:
        return schedule.warmup_steps
    share = round(schedule.warmup_share * (schedule.steps or config.train.steps))
    return min(schedule.warmup_steps, share) if schedule.warmup_steps else share


def trained_names(module: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Names of the parameters that may change and match one of the patterns; all that may without patterns.

    Raises: ConfigError for a pattern that matches none.
    """
    names = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
    for pattern in patterns:
        if not any(re.search(pattern, name) for name in names):
            raise ConfigError(
                f"train.trainable: pattern must match a parameter that may change, got {pattern!r}; "
                f"there are {', '.join(dict.fromkeys(name.partition('.')[0] for name in names))}"
            )
    return [name for name in names if not patterns or any(re.search(p, name) for p in patterns)]
