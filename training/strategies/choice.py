"""The strategy of a configuration, and what it asks of the rest of it."""

from __future__ import annotations

from flowcore.errors import ConfigError
from training.config import LoopConfig, RunConfig
from training.stages import stages_of
from training.strategies.plain import Strategy
from training.team import Team


def strategy_of(config: RunConfig, team: Team) -> Strategy:
    """How `config` spreads its model over the processes."""
    settings = config.distributed
    if settings.strategy == "fsdp2":
        from training.strategies.sharded import Sharded

        return Sharded(team, is_offloaded=settings.cpu_offload)
    if team.size > 1:
        from training.strategies.data_parallel import DataParallel

        return DataParallel(team)
    return Strategy(team)


def check_processes(config: LoopConfig, processes: int) -> None:
    """Raises: ConfigError if batches cannot be divided among so many processes."""
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
