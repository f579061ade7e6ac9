"""The bundled weights: one folder per name, each with a `model.safetensors`.

A name is what users write in place of a path: `xut-demo` (diffusion model), `scenes-vae`, `scenes-text`.
"""

from pathlib import Path

from ..errors import CheckpointError

FILE_NAME = "model.safetensors"


def list_builtin() -> list[str]:
    """Return the names of the bundled weights, sorted."""
    return sorted(path.parent.name for path in Path(__file__).parent.glob(f"*/{FILE_NAME}"))


def builtin(name: str) -> Path:
    """Return the file of a bundled name.

    Raises: CheckpointError if there is no such name; the message lists those there are.
    """
    path = Path(__file__).parent / name / FILE_NAME
    if name not in list_builtin():
        names = ", ".join(list_builtin()) or "none"
        raise CheckpointError(f"bundled weights must be one of ({names}), got {name!r}")
    return path


def resolve(path_or_name: str | Path) -> Path:
    """Return the path that a user means: an existing file or folder, else a bundled name.

    A file of the user's own wins over a bundled name.
    Raises: CheckpointError if it is neither.
    """
    path = Path(path_or_name).expanduser()
    if path.exists():
        return path
    if str(path_or_name) in list_builtin():
        return builtin(str(path_or_name))
    names = ", ".join(list_builtin()) or "none"
    raise CheckpointError(
        f"weights must be an existing file or folder or a bundled name ({names}), got {str(path_or_name)!r}"
    )
