"""Which precision a part of a model computes in."""

import contextlib

import torch


def no_autocast(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Return the context in which matrices keep float32; there is no autocast on the meta device."""
    if device.type == "meta":
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)
