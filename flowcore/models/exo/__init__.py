"""Exo: a Qwen3-VL that looks at noised latents, refines in iterations, and marks what it edits."""

from importlib import import_module

from .config import PRESETS, ExoConfig, infer_config, is_match
from .model import Exo
from .states import PrefixState, StepResult, join_prefixes
from .velocity import velocity

__all__ = [
    "PRESETS",
    "Exo",
    "ExoConfig",
    "PrefixState",
    "StepResult",
    "infer_config",
    "is_match",
    "join_prefixes",
    "velocity",
]


def __getattr__(name: str) -> object:
    """Return the class of the description, which needs the whole package and loads at first use."""
    if name != "ExoT2IInference":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("...exo", __name__), name)
