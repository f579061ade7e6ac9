"""Pretend that there is a GPU: weights and inputs become fakes on `cuda:0`; wrong devices and dtypes raise.

ComfyUI moves the weights with its own code, by a budget of bytes; what does not fit stays on the CPU and must
be brought to its input when it is used.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import comfy.model_management as mm
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

GPU = torch.device("cuda", 0)
BUDGETS = {"all": 0.0, "half": 0.5, "none": 1e-9}


class SameDevice(TorchFunctionMode):
    """Convolutions of tensors on different devices raise; fakes do not compare these by themselves."""

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if "conv" in getattr(function, "__name__", ""):
            devices = {leaf.device for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
            if len(devices) > 1:
                raise RuntimeError(f"{function.__name__} got tensors on {sorted(map(str, devices))}")
        return function(*args, **(kwargs or {}))


def _apply(module: nn.Module, change: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """Module._apply without the swapping of storages, which fakes do not have."""
    for child in module.children() if recurse else ():
        child._apply(change)
    for name, parameter in module._parameters.items():
        if parameter is not None:
            module._parameters[name] = nn.Parameter(change(parameter.data), requires_grad=False)
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = change(buffer)
    return module


def _free_memory(_device: object = None, torch_free_too: bool = False) -> int | tuple[int, int]:
    return (8 << 30, 8 << 30) if torch_free_too else 8 << 30


@contextlib.contextmanager
def on_fake_gpu(patcher: ModelPatcher, budget: float) -> Iterator[FakeTensorMode]:
    """Load a patcher's model with a share of its size as budget (0 = all of it); inside, all is fake."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    memory = int(patcher.model_size() * budget) if budget in (0.0, 0.5) else 1
    patches = [
        mock.patch.object(nn.Module, "_apply", _apply),
        mock.patch.object(mm, "get_free_memory", _free_memory),
        mock.patch.object(torch.cuda, "synchronize"),
        mock.patch.object(patcher, "load_device", GPU),
    ]
    with contextlib.ExitStack() as stack, torch.no_grad():
        for patch in patches:
            stack.enter_context(patch)
        _apply(patcher.model, mode.from_tensor)
        stack.enter_context(mode)
        stack.enter_context(SameDevice())
        patcher.patch_model(GPU, lowvram_model_memory=memory)
        yield mode


def where(module: nn.Module) -> set[str]:
    """The kinds of devices that a module's parameters lie on."""
    return {parameter.device.type for parameter in module.parameters() if isinstance(parameter, FakeTensor)}
