"""The strategy of a configuration, and what it asks of the rest of it."""

from __future__ import annotations

import importlib.util

from flowcore.errors import ConfigError
from training.config import Optimizer, RunConfig
from training.stages import stages_of
from training.strategies.plain import Strategy
from training.team import Team

ZERO = {"zero2": 2, "zero3": 3}
ZERO_OPTIMIZERS = ("adamw", "sgd")


def strategy_of(config: RunConfig, team: Team) -> Strategy:
    """How `config` spreads its model over the processes."""
    settings = config.distributed
    if settings.strategy in ZERO:
        from training.strategies.zero import Zero

        return Zero(team, stage=ZERO[settings.strategy], is_offloaded=settings.cpu_offload)
    if settings.strategy == "fsdp2":
        from training.strategies.sharded import Sharded

        return Sharded(team, is_offloaded=settings.cpu_offload)
    if team.size > 1:
        from training.strategies.data_parallel import DataParallel

        return DataParallel(team)
    return Strategy(team)


def check_processes(config: RunConfig, processes: int) -> None:
    """Raises: ConfigError if batches cannot be divided among so many, or the strategy does not fit."""
    if config.distributed.strategy in ZERO:
        _check_zero(config)
    for stage in stages_of(config):
        train = stage.config.train
        place = f"stage {stage.name}: " if stage.name else ""
        if train.batch_size % processes:
            low = train.batch_size // processes * processes
            nearest = f"{low} and {low + processes}" if low else f"{processes}"
            raise ConfigError(
                f"{place}train.batch_size must be a multiple of the {processes} processes, got "
                f"{train.batch_size}; nearest: {nearest}"
            )
        share = train.batch_size // processes
        if train.micro_batch_size and share % train.micro_batch_size:
            raise ConfigError(
                f"{place}train.micro_batch_size must divide batch_size / processes ({train.batch_size} / "
                f"{processes} = {share}), got {train.micro_batch_size}"
            )


def check_package(config: RunConfig) -> None:
    """Raises: ConfigError if the strategy needs a package that is not installed."""
    strategy = config.distributed.strategy
    if strategy in ZERO and importlib.util.find_spec("deepspeed") is None:
        raise ConfigError(
            f"distributed.strategy must be none, ddp or fsdp2 without the package deepspeed, got {strategy}; "
            "install flowcore[zero] or use fsdp2"
        )


def _check_zero(config: RunConfig) -> None:
    """Raises: ConfigError for what deepspeed's engine does not take."""
    strategy = config.distributed.strategy
    kinds = _kinds(config.optimizer)
    if len(kinds) > 1 or kinds[0] not in ZERO_OPTIMIZERS:
        raise ConfigError(
            f"optimizer.name must be {' or '.join(ZERO_OPTIMIZERS)}, one for all groups, with "
            f"distributed.strategy {strategy}, got {' and '.join(kinds)}; adamw, muon and sgd work with "
            "none, ddp and fsdp2, together, too"
        )
    if config.train.stages:
        raise ConfigError(
            f"train.stages must be left out with distributed.strategy {strategy}, got "
            f"{len(config.train.stages)}; run each stage by itself, or use ddp or fsdp2"
        )
    if config.precision == "float16":
        raise ConfigError(
            f"precision must be float32 or bfloat16 with distributed.strategy {strategy}, got float16"
        )


def _kinds(optimizer: Optimizer) -> list[str]:
    """Names of the optimizers of a configuration."""
    return sorted({optimizer.name, *(group.name for group in optimizer.groups if group.name)})
