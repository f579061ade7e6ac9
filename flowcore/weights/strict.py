"""Put weights into a module built on the meta device, with every key and shape checked first."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from ..lazy import outline
from .placement import placed


def assign_strict(
    module: nn.Module,
    tensors: Mapping[str, Tensor],
    *,
    source: str,
    what: str,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> None:
    """Make the tensors the module's weights, without a copy of those that stay as they are.

    Args:
        module: usually built on the meta device.
        tensors: one for every key of the module's state dict and no other.
        source: the file, for messages.
        what: the kind of model, for messages.
        device: where they go.
        dtype: of the parameters; None = their own, as buffers always keep.
    Raises: CheckpointError with counts and the first five missing, unexpected and misshapen keys.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    check_strict(expected, outline(tensors), source=source, what=what)
    dtypes = {} if dtype is None else {name: dtype for name, _ in module.named_parameters()}
    module.load_state_dict(placed(tensors, dtypes, device), strict=True, assign=True)


def check_strict(
    expected: Mapping[str, tuple[int, ...]], tensors: Mapping[str, Tensor], *, source: str, what: str
) -> None:
    """Compare the tensors with the expected keys and shapes.

    Raises: CheckpointError as `assign_strict` does.
    """
    found = compare(expected, tensors)
    faults = [
        _listing(label, names)
        for label, names in (
            ("missing", found.missing),
            ("unexpected", found.unexpected),
            ("wrong shape", found.misshapen),
        )
        if names
    ]
    if faults:
        raise CheckpointError(
            f"{source} must hold exactly the {len(expected)} tensors of a {what}, got {'; '.join(faults)}; "
            "use a complete file of that model"
        )


class Differences(NamedTuple):
    """Names that are missing, that are too many, and lines on those of another shape."""

    missing: list[str]
    unexpected: list[str]
    misshapen: list[str]


def compare(expected: Mapping[str, tuple[int, ...]], tensors: Mapping[str, Tensor]) -> Differences:
    """Return in what the tensors differ from the expected keys and shapes."""
    return Differences(
        missing=[name for name in expected if name not in tensors],
        unexpected=[name for name in tensors if name not in expected],
        misshapen=[
            f"{name} {tuple(tensors[name].shape)} instead of {shape}"
            for name, shape in expected.items()
            if name in tensors and tuple(tensors[name].shape) != shape
        ],
    )


def _listing(label: str, names: Sequence[str]) -> str:
    """Return the count and the first five names."""
    more = ", ..." if len(names) > 5 else ""
    return f"{len(names)} {label} ({', '.join(names[:5])}{more})"
