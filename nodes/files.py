"""The weight files a loader offers: the bundled ones first, then the user's, by the names it shows."""

from enum import Enum
from pathlib import Path

import folder_paths

from ..flowcore.assets import builtin, list_builtin
from ..flowcore.errors import CheckpointError

_PLAIN_PYTHON = ("exo-demo",)
"""Bundled models that have no place in a graph yet."""


class Kind(Enum):
    """What a file holds; the value is ComfyUI's model folder for it."""

    MODEL = "diffusion_models"
    TEXT = "text_encoders"
    VAE = "vae"


def choices(kind: Kind) -> list[str]:
    """Return the names to choose from. A user's file called like a bundled one is listed once, and used."""
    bundled = [shown for shown, name in _bundled().items() if _kind_of(name) is kind]
    return bundled + [name for name in folder_paths.get_filename_list(kind.value) if name not in bundled]


def find(kind: Kind, shown: str) -> Path:
    """Return the file of a name from `choices`.

    Raises: CheckpointError if there is no such file.
    """
    own = folder_paths.get_full_path(kind.value, shown)
    if own is not None:
        return Path(own)
    name = _bundled().get(shown)
    if name is not None and _kind_of(name) is kind:
        return builtin(name)
    raise CheckpointError(
        f"{shown!r} must be a file in ComfyUI's folder models/{kind.value}, got none; put it there and "
        "press R to refresh"
    )


def check(kind: Kind, shown: str) -> bool | str:
    """Return True if the file is there, else the sentence that ComfyUI shows before it runs anything."""
    try:
        find(kind, shown)
    except CheckpointError as error:
        return str(error)
    return True


def fingerprint(kind: Kind, shown: str) -> str:
    """Return a text that changes when the file under the name does, so that ComfyUI loads it again."""
    try:
        status = find(kind, shown).stat()
    except (CheckpointError, OSError):
        return "absent"
    return f"{status.st_mtime_ns}-{status.st_size}"


def _bundled() -> dict[str, str]:
    """Return the shown name of every bundled weight file that a graph can use, to its own name."""
    return {f"flowcore-{name}.safetensors": name for name in list_builtin() if name not in _PLAIN_PYTHON}


def _kind_of(name: str) -> Kind:
    """Return what a bundled name holds: names end in -vae or -text, diffusion models in neither."""
    if name.endswith("-vae"):
        return Kind.VAE
    return Kind.TEXT if name.endswith("-text") else Kind.MODEL
