"""Exo: a Qwen3-VL that looks at noised latents, refines in iterations, and marks what it edits."""

from .config import PRESETS, ExoConfig, infer_config, is_match
from .model import Exo
from .states import PrefixState, StepResult
from .velocity import velocity

__all__ = [
    "PRESETS",
    "Exo",
    "ExoConfig",
    "PrefixState",
    "StepResult",
    "infer_config",
    "is_match",
    "velocity",
]
