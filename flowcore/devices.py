"""Devices and dtypes by the names that people write."""

import torch

from .errors import ConfigError

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def find_device(name: str) -> torch.device:
    """Return the device of a name; "auto" prefers CUDA, then MPS.

    Raises: ConfigError if it is unknown or this machine lacks it.
    """
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        return torch.device(next(kind for kind in ("cuda", "mps", "cpu") if available[kind]))
    kind = name.split(":", maxsplit=1)[0]
    if not available.get(kind, False):
        present = ", ".join(kind for kind, there in available.items() if there)
        raise ConfigError(f"device must be auto or one that is present ({present}), got {name!r}")
    return torch.device(name)


def find_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype of a name; "auto" is float32 on the CPU and bfloat16 elsewhere.

    Raises: ConfigError if it is unknown.
    """
    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    if name not in _DTYPES:
        raise ConfigError(f"dtype must be auto or one of {', '.join(_DTYPES)}, got {name!r}")
    return _DTYPES[name]
