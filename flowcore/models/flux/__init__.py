"""Flux: the sequence-to-sequence transformer of Flux Core, which is also FLUX.1."""

from .config import PRESETS, FluxConfig, infer_config, is_match
from .model import Flux
from .packing import PATCH_SIZE, TEXT_LENGTH
from .velocity import default_extras, velocity

__all__ = [
    "PATCH_SIZE",
    "PRESETS",
    "TEXT_LENGTH",
    "Flux",
    "FluxConfig",
    "default_extras",
    "infer_config",
    "is_match",
    "velocity",
]
