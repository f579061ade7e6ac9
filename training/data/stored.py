"""Tensors of samples that are encoded already, from their files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from flowcore.models.exo.grids import CELL, memory_grid
from training.data.cache import Encoded
from training.data.sample import LATENTS, SOURCE_LATENTS, DataError, Sample, SampleError
from training.keys import generator


class StoredFiles:
    """Reads samples one after the other; those of one file while it is open."""

    def __init__(self) -> None:
        """Opens nothing yet."""
        self._path: Path | None = None
        self._file: Any = None

    def read(self, sample: Sample) -> Encoded:
        """The sample's latents as `latents`, and what else of it the file holds.

        Raises: SampleError if the file cannot be read, or holds values that are not finite.
        """
        assert sample.stored is not None
        try:
            if sample.path != self._path:
                self._file, self._path = safe_open(sample.path, framework="pt"), sample.path
            tensors = {LATENTS: self._file.get_tensor(sample.stored.name)}
            tensors |= {name: self._file.get_tensor(name) for name in sorted(sample.stored.others)}
            if sample.stored.source:
                tensors[SOURCE_LATENTS] = self._file.get_tensor(sample.stored.source)
            elif sample.stored.composite:
                other = self._file.get_tensor(sample.stored.composite)
                tensors[SOURCE_LATENTS] = compose(tensors[LATENTS], other, sample.key)
        except (OSError, SafetensorError) as err:
            raise SampleError(sample.path, f"file must be safetensors, got {err}") from err
        for name, tensor in tensors.items():
            if not torch.isfinite(tensor).all():
                raise SampleError(sample.path, f"{name} of the sample must be finite, got others")
        return tensors


def compose(latents: Tensor, other: Tensor, name: str) -> Tensor:
    """Latents `c h w` with a rectangle of others of their shape: a quarter to three quarters of each side.

    In whole cells of the memory; where it lies depends on the name alone.
    """
    chance, made = generator(0, f"composite {name}"), latents.clone()
    spans = []
    for side in memory_grid(latents.shape[-2], latents.shape[-1]):
        length = int(torch.randint(max(1, side // 4), max(1, 3 * side // 4) + 1, (1,), generator=chance))
        first = int(torch.randint(side - length + 1, (1,), generator=chance))
        spans.append(slice(first * CELL, (first + length) * CELL))
    made[:, spans[0], spans[1]] = other[:, spans[0], spans[1]]
    return made


def check_channels(sample: Sample, latents: Tensor, channels: int) -> None:
    """Raises: DataError if latents `c h w` are not those of the run's autoencoder."""
    if latents.shape[0] != channels:
        raise DataError(
            f"{sample.path} must hold latents of encoders.vae with {channels} channels, got "
            f"{latents.shape[0]}; encode the pictures again"
        )


def without_padding(tensors: Encoded) -> Encoded:
    """Conditions of a sample without the tokens that its mask leaves out, and without the mask."""
    mask = tensors.get("context_mask")
    kept = {name: tensor for name, tensor in tensors.items() if name != "context_mask"}
    return kept if mask is None else {**kept, "context": kept["context"][mask.bool()]}


def check_told(path: Path, told: Encoded, like: Encoded) -> None:
    """Raises: DataError if the text of a sample differs in kind from that of an encoder, `context` m d."""
    kinds = [
        {name: (part.is_floating_point(), *part.shape[-1:]) for name, part in text.items()}
        for text in (told, like)
    ]
    for name in ("context", "pooled"):
        found, wanted = (kind.get(name) for kind in kinds)
        if found != wanted:
            raise DataError(
                f"{path} must hold {name} as encoders.text gives it, width {wanted and wanted[1]}, got "
                f"{found and found[1]}; encode the captions again"
            )
