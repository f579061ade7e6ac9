"""Parts of the trunk that lie in the memory of the CPU and come to the accelerator when they are needed."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..ops import BlockFn, RunBlockFn

OFFLOADS = ("none", "vision", "layers")
"""What lies on the CPU: nothing; the vision tower but while it looks; that and the decoder layers, each but
while it computes."""
_CPU = torch.device("cpu")


def check_offload(name: str, device: torch.device) -> None:
    """Check the name, and that there is a device to offload from. Raises: ConfigError."""
    if name not in OFFLOADS:
        raise ConfigError(f"offload must be one of {', '.join(OFFLOADS)}, got {name!r}")
    if name != "none" and device.type == "cpu":
        raise ConfigError(f"offload must be none on the CPU, where everything lies, got {name}")


def place(trunk: nn.Module, offload: str, device: torch.device) -> None:
    """Move the parts of a trunk to where they are to lie: to the device, or to the CPU.

    On machines with CUDA the memory of decoder layers on the CPU is pinned: it is copied faster.
    """
    trunk.get_submodule("visual").to(device if offload == "none" else _CPU)
    for name, part in trunk.get_submodule("language_model").named_children():
        part.to(_CPU if name == "layers" and offload == "layers" else device)
    if offload == "layers" and torch.cuda.is_available():
        for tensor in _tensors(decoder_layers(trunk)):
            tensor.data = tensor.data.pin_memory()


@contextmanager
def brought(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Move a module to a device for the time of the context, and back to where it was."""
    home = next(module.parameters()).device
    module.to(device)
    try:
        yield
    finally:
        module.to(home)


def streamed(layers: nn.ModuleList, device: torch.device) -> RunBlockFn:
    """Return how blocks are run where decoder layers lie elsewhere: each comes for its block as a copy."""

    def run(kind: str, index: int, block: BlockFn, x: Tensor) -> Tensor:
        if kind != "trunk":
            return block(x)
        homes = [(tensor, tensor.data) for tensor in _tensors(layers[index])]
        try:
            for tensor, home in homes:
                tensor.data = home.to(device, non_blocking=True, copy=True)
            return block(x)
        finally:
            for tensor, home in homes:
                tensor.data = home

    return run


def decoder_layers(trunk: nn.Module) -> nn.ModuleList:
    """Return the decoder layers of a trunk."""
    return cast("nn.ModuleList", trunk.get_submodule("language_model.layers"))


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]
