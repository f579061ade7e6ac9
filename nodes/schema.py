"""Schemas for all installed ComfyUI versions."""

import dataclasses
from typing import Any

from comfy_api.latest import io

_FIELDS = frozenset(field.name for field in dataclasses.fields(io.Schema))


def schema(*, search_aliases: list[str], **fields: Any) -> io.Schema:
    """Return the schema of a node, with search aliases where the installed version has them."""
    if "search_aliases" in _FIELDS:
        fields["search_aliases"] = search_aliases
    return io.Schema(**fields)
