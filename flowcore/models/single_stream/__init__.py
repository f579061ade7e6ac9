"""SingleStreamDiT: one stream of text and image tokens, with filters by spatial frequency."""

from .config import PRESETS, SingleStreamConfig, infer_config, is_match, version
from .model import SingleStreamDiT
from .velocity import velocity

__all__ = [
    "PRESETS",
    "SingleStreamConfig",
    "SingleStreamDiT",
    "infer_config",
    "is_match",
    "velocity",
    "version",
]
