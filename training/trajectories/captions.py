"""What a teacher is asked for: a file of prompts, or subjects in many settings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from flowcore.errors import ConfigError

FEW = 25
"""Records that a caption may serve before a warning: 1,000 captions for 25,000 records."""

_SUBJECTS = (
    "an old fisherman mending a net",
    "a young violinist before a concert",
    "a baker with flour on her hands",
    "a child with a paper crown",
    "a mountaineer resting at a hut",
    "a wristwatch on dark stone",
    "a glass bottle of perfume",
    "a pair of leather boots",
    "a ceramic teapot with two cups",
    "a folded woollen blanket",
    "a spiral staircase of concrete",
    "a wooden chapel in a forest",
    "a narrow street of stone houses",
    "a railway station with an iron roof",
    "a glass tower beside a river",
    "a valley of terraced fields",
    "a rocky coast with a lighthouse",
    "a birch forest after snowfall",
    "a desert with long dunes",
    "a lake below bare mountains",
    "overlapping translucent circles",
    "a mosaic of broken triangles",
    "waves of parallel lines",
    "ink spreading in water",
    "a lattice of bright cubes",
)
_LOOKS = (
    "a photograph of",
    "an oil painting of",
    "a watercolor of",
    "a charcoal drawing of",
    "a flat illustration of",
    "a close view of",
    "a wide view of",
    "a miniature model of",
)
_LIGHTS = (
    "in soft morning light",
    "in harsh noon light",
    "at sunset",
    "at night under lamps",
    "in fog",
    "in muted colors",
)


def read_prompts(path: Path | None, option: str = "--prompts") -> list[str]:
    """The prompts of a UTF-8 text file, one a line, blank lines left out; the built-in ones for no file.

    Raises: ConfigError if the file cannot be read or holds none.
    """
    if path is None:
        return [f"{look} {subject} {light}" for light in _LIGHTS for look in _LOOKS for subject in _SUBJECTS]
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as err:
        raise ConfigError(f"{option} must be a readable UTF-8 text file, got {path} ({err})") from err
    prompts = [" ".join(line.split()) for line in lines if line.strip()]
    if not prompts:
        raise ConfigError(f"{option} must hold a prompt a line, got none in {path}")
    return prompts


def few_captions(prompts: Sequence[str], count: int) -> str | None:
    """A warning if few distinct captions serve many records."""
    distinct = len(set(prompts))
    if distinct * FEW >= count:
        return None
    return f"{distinct:,} distinct captions serve {count:,} records; give at least {-(-count // FEW):,}"
