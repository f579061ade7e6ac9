"""XUT: the cross-U transformer of HDM and Ouroboros."""

from .config import PRESETS, TreadConfig, XUTConfig, infer_config
from .model import XUDiT
from .velocity import velocity

__all__ = ["PRESETS", "TreadConfig", "XUDiT", "XUTConfig", "infer_config", "velocity"]
