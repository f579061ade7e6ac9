"""How a run's model is spread over its processes: one small class each, all with the same methods."""

from __future__ import annotations

from training.strategies.choice import check_package, check_processes, strategy_of
from training.strategies.plain import Strategy

__all__ = ["Strategy", "check_package", "check_processes", "strategy_of"]
