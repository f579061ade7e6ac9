"""Folders of encoded samples, one safetensors file each: rows of the `batch.safetensors` that runs write."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from safetensors import SafetensorError, safe_open

from flowcore.vae.latent_spec import LATENT_SPECS
from training.config import CELL, Data, Dataset
from training.data.sample import (
    LATENTS,
    SOURCE_LATENTS,
    DataError,
    Reject,
    Sample,
    SampleError,
    Stored,
    read_usable,
)
from training.stop import StopFlag

_TEXT = "context"
_NAMES = frozenset({LATENTS, SOURCE_LATENTS, _TEXT, "context_mask", "pooled", "pixels", "grids"})


def latent_cell(channels: int) -> int:
    """Pixels on a side of a latent cell: 16 for the channels of FLUX.2, which are packed, else 8."""
    flux2 = LATENT_SPECS["flux2"]
    return flux2.downscale if channels == flux2.channels else CELL


def scan_latents(
    dataset: Dataset, where: str, data: Data, rejects: list[Reject], stop: StopFlag
) -> list[Sample]:
    """Files of a folder as samples, in the order of their names, by a look at their headers alone.

    Raises: DataError that names the folder or file and the remedy; StoppedError.
    """
    root = Path(dataset.path).expanduser()
    files = sorted(path for path in root.glob("*.safetensors") if not path.name.startswith("."))
    if not files:
        raise DataError(f"{where}: {root} must be a folder of *.safetensors, found none there")
    need = f"{where}: {root} must hold a usable file"
    return read_usable(files, partial(_read_header, data=data), data, rejects, stop, need)


def _read_header(path: Path, data: Data) -> Sample:
    """The sample of a file. Raises: SampleError."""
    try:
        with safe_open(path, framework="pt") as file:
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 - no dict
    except (OSError, SafetensorError) as err:
        raise SampleError(path, f"file must be safetensors, got {err}") from err
    unknown = sorted(set(shapes) - _NAMES)
    if unknown:
        raise SampleError(path, f"tensors must be among {', '.join(sorted(_NAMES))}, got {unknown[0]}")
    shape = shapes.get(LATENTS, [])
    if len(shape) != 3 or 0 in shape:
        raise SampleError(path, f"{LATENTS} must be `c h w`, got {shape or 'none'}")
    if shapes.get(SOURCE_LATENTS, shape) != shape:
        raise SampleError(
            path, f"{SOURCE_LATENTS} must be {shape} as {LATENTS}, got {shapes[SOURCE_LATENTS]}"
        )
    if _TEXT not in shapes and data.missing_caption != "empty":
        raise SampleError(
            path,
            f"{_TEXT} must be there, the states of a caption, got none",
            setting="missing_caption",
            remedy="add it or set data.missing_caption to skip or empty",
        )
    cell = latent_cell(shape[0])
    others = frozenset(shapes) - {LATENTS}
    return Sample(
        path.name, path, "", shape[2] * cell, shape[1] * cell, stored=Stored(LATENTS, others=others)
    )
