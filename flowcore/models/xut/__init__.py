"""XUT: the cross-U transformer of HDM and Ouroboros."""

from .config import PRESETS, TreadConfig, XUTConfig, infer_config, is_match
from .model import XUDiT
from .velocity import size_extras, velocity

__all__ = [
    "PRESETS",
    "TreadConfig",
    "XUDiT",
    "XUTConfig",
    "infer_config",
    "is_match",
    "size_extras",
    "velocity",
]
