"""The other parts of a pipeline that a model file names: autoencoder, text encoder, text mode."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

import torch

from .errors import CheckpointError, ConfigError
from .hub import PREFIX
from .text.encoder import TextMode
from .vae.autoencoder import Autoencoder, load_vae
from .vae.latent_spec import spec_from_metadata
from .vae.tiling import Tiling
from .weights.checkpoint import LoadedModel

Source: TypeAlias = str | Path


def part_source(part: str, given: Source | None, metadata: Mapping[str, str], model: Path) -> str:
    """Return where a part of the pipeline is: the argument, else what the model file names."""
    source = given if given is not None else metadata.get(f"flowcore.{part}")
    if source is None:
        option = f"--{part.replace('_', '-')}"
        raise CheckpointError(
            f"{model.name} must name its {part} in the metadata flowcore.{part}, got none; "
            f"pass one with {part}= ({option})"
        )
    if given is None and str(source).startswith(PREFIX):
        raise CheckpointError(
            f"the {part} that {model.name} names must be a local file, got {source}; to download it, "
            f"pass {part}={source!r} (--{part.replace('_', '-')} {source})"
        )
    beside = model.parent / source
    return str(beside if given is None and beside.exists() else source)


def text_sources(
    given: Source | Sequence[Source] | None, metadata: Mapping[str, str], model: Path
) -> str | list[str]:
    """Return where the text encoders are, one or several: the argument, else what the model file names."""
    if given is not None and not isinstance(given, str | Path):
        several = [str(source) for source in given]
        return several[0] if len(several) == 1 else several
    named = metadata.get("flowcore.text_encoder", "")
    if given is None and named.startswith("["):
        try:
            names = [str(name) for name in json.loads(named)]
        except ValueError as err:
            raise CheckpointError(
                f"flowcore.text_encoder in {model.name} must be a name or a JSON list, got {named[:60]}"
            ) from err
        return [part_source("text_encoder", None, {"flowcore.text_encoder": name}, model) for name in names]
    return part_source("text_encoder", given, metadata, model)


def stated_size(metadata: Mapping[str, str]) -> tuple[int, int] | None:
    """Return width and height in pixels that a model's file states, None if it states none."""
    sides = metadata.get("modelspec.resolution", "").split("x")
    if len(sides) == 2 and all(side.isdigit() for side in sides):
        return int(sides[0]), int(sides[1])
    return None


def load_model_vae(
    source: str, model: LoadedModel, name: str, device: torch.device, tiling: Tiling
) -> Autoencoder:
    """Return the autoencoder, in the latent space of the model.

    What the model's file states goes before what the autoencoder's states; the architecture's comes last.
    """
    stated = spec_from_metadata(model.metadata, source=name)
    spec = stated or model.architecture.latent_spec
    vae = load_vae(source, spec=spec, device=device, tiling=tiling)
    return vae if stated is None else Autoencoder(vae.module, stated, tiling=tiling)


_TEXT_MODES: dict[str, TextMode] = {"sequence": "sequence", "pooled": "pooled"}


def text_mode_of(name: str) -> TextMode:
    """Return the text mode of a name; ConfigError if there is none."""
    if name in _TEXT_MODES:
        return _TEXT_MODES[name]
    raise ConfigError(f"the text mode must be sequence or pooled, got {name!r}; pass text_mode (--text-mode)")
