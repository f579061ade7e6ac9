"""What a file's tensors are, from their names: a model in one of its layouts, or another part."""

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..lazy import without_prefix
from ..models import Architecture, Layout, detect, find_layout

_ADAPTER_PARTS = (".lora_", ".lokr_", ".hada_", ".lora.", ".processor.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Recognised:
    """A model's tensors under the original names, and how the file has them.

    Attributes:
        prefix: what stands before the names in the file.
        layout: foreign naming that was converted, or None.
        version: which version of the architecture wrote the file, as far as names tell, or "".
        state: tensors under the original names.
        metadata: with the settings that the layout implies.
        others: names outside the model, such as an autoencoder's in the same file.
    """

    architecture: Architecture
    prefix: str
    layout: Layout | None
    version: str
    state: Mapping[str, Tensor]
    metadata: dict[str, str]
    others: tuple[str, ...]

    def describe(self) -> str:
        """Say what was found: architecture and version, number of tensors, layout, prefix, what else."""
        parts = [
            " ".join((self.architecture.name, self.version)).strip(),
            f"{len(self.state)} tensors",
            *([f"layout {self.layout.name}"] if self.layout else []),
            *([f"prefix {self.prefix}"] if self.prefix else []),
            *([f"{len(self.others)} others"] if self.others else []),
        ]
        return ", ".join(parts)


def recognise(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Recognised:
    """Return which model the tensors are, with its own names.

    Raises: CheckpointError that says what was found instead.
    """
    architecture, prefix = detect(tensors.keys())
    own = without_prefix(tensors, prefix)
    version = architecture.version(own.keys())
    layout = find_layout(architecture, own.keys())
    return Recognised(
        architecture=architecture,
        prefix=prefix,
        layout=layout,
        version=version,
        state=layout.convert(own) if layout else own,
        metadata=_with_settings(metadata, layout.settings if layout else {}),
        others=tuple(name for name in tensors if not name.startswith(prefix)),
    )


def _with_settings(metadata: Mapping[str, str], settings: Mapping[str, Any]) -> dict[str, str]:
    """Return the metadata with further fields of the configuration."""
    if not settings:
        return dict(metadata)
    try:
        stored = json.loads(metadata.get("flowcore.config", "{}"))
    except json.JSONDecodeError:  # `infer_config` says what is wrong
        return dict(metadata)
    return {**metadata, "flowcore.config": json.dumps({**stored, **settings})}


def is_adapter(names: Collection[str]) -> bool:
    """Return whether names are those of adapters such as LoRA."""
    return any(part in name for name in names for part in _ADAPTER_PARTS)
