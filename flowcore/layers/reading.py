"""What configurations are read from: tensor names and shapes, and JSON-like values."""

import difflib
import json
import re
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from torch import Tensor

from ..errors import CheckpointError, ConfigError


class TensorReader:
    """Reads sizes from the names and shapes of a checkpoint's tensors; `what` names the model in messages."""

    def __init__(self, tensors: Mapping[str, Tensor], what: str) -> None:
        self.tensors = tensors
        self.what = what

    def shape(self, key: str, axes: int) -> tuple[int, ...]:
        """Return the shape of a tensor that must be there. Raises: CheckpointError."""
        if key not in self.tensors:
            raise CheckpointError(
                f"a {self.what} checkpoint must hold {key}, got {len(self.tensors)} tensors without it"
            )
        shape = tuple(self.tensors[key].shape)
        if len(shape) != axes or 0 in shape:
            raise CheckpointError(f"{key} must have {axes} axes of at least 1, got shape {shape}")
        return shape

    def size(self, key: str, axis: int) -> int | None:
        """Return one size of a tensor that may be absent."""
        return self.tensors[key].shape[axis] if key in self.tensors else None

    def find(self, pattern: re.Pattern[str]) -> str | None:
        """Return the first name that fits the pattern."""
        return next((key for key in self.tensors if pattern.fullmatch(key)), None)

    def indices(self, prefix: str) -> set[int]:
        """Return the numbers that follow the prefix in the names."""
        found = {key[len(prefix) :].split(".", 1)[0] for key in self.tensors if key.startswith(prefix)}
        return {int(number) for number in found if number.isdigit()}


def stored_config(metadata: Mapping[str, str] | None) -> Mapping[str, Any]:
    """Return the configuration in a file's metadata, or an empty one. Raises: CheckpointError."""
    try:
        stored = json.loads((metadata or {}).get("flowcore.config", "{}"))
    except json.JSONDecodeError as err:
        raise CheckpointError(f"metadata flowcore.config must be JSON, got an error at {err.pos}") from err
    if not isinstance(stored, dict):
        raise CheckpointError(f"metadata flowcore.config must be a JSON object, got {type(stored).__name__}")
    return stored


def check_names(cls: type[Any], values: Mapping[str, Any], prefix: str = "") -> None:
    """Check that all keys are fields of the dataclass. Raises: ConfigError, with the nearest name."""
    known = [field.name for field in fields(cls)]
    for name in values:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; nearest is {prefix}{near[0]}" if near else f"; known are {', '.join(known)}"
            raise ConfigError(f"{prefix}{name} must be a field of {cls.__name__}, got an unknown name{hint}")
