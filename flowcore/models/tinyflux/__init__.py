"""TinyFlux: the small two-stream transformer of TinyFlux-Deep, with its predictors Lune and Sol."""

from .config import PRESETS, TinyFluxConfig, infer_config, is_match
from .model import TEXT_LENGTH, TinyFlux
from .velocity import velocity, velocity_and_experts

__all__ = [
    "PRESETS",
    "TEXT_LENGTH",
    "TinyFlux",
    "TinyFluxConfig",
    "infer_config",
    "is_match",
    "velocity",
    "velocity_and_experts",
]
