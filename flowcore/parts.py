"""The other parts of a pipeline that a model file names: autoencoder, text encoder, text mode."""

from collections.abc import Mapping
from pathlib import Path

import torch

from .errors import CheckpointError, ConfigError
from .text.gemma3 import TextMode
from .vae.autoencoder import Autoencoder, load_vae
from .vae.latent_spec import spec_from_metadata
from .weights.checkpoint import LoadedModel


def part_source(part: str, given: str | Path | None, metadata: Mapping[str, str], model: Path) -> str:
    """Return where a part of the pipeline is: the argument, else what the model file names."""
    source = given if given is not None else metadata.get(f"flowcore.{part}")
    if source is None:
        option = f"--{part.replace('_', '-')}"
        raise CheckpointError(
            f"{model.name} must name its {part} in the metadata flowcore.{part}, got none; "
            f"pass one with {part}= ({option})"
        )
    beside = model.parent / source
    return str(beside if given is None and beside.exists() else source)


def load_model_vae(source: str, model: LoadedModel, name: str, device: torch.device) -> Autoencoder:
    """Return the autoencoder, in the latent space of the model.

    What the model's file states goes before what the autoencoder's states; the architecture's comes last.
    """
    stated = spec_from_metadata(model.metadata, source=name)
    vae = load_vae(source, spec=stated or model.architecture.latent_spec, device=device)
    return vae if stated is None else Autoencoder(vae.module, stated)


_TEXT_MODES: dict[str, TextMode] = {"sequence": "sequence", "pooled": "pooled"}


def text_mode_of(name: str) -> TextMode:
    """Return the text mode of a name; ConfigError if there is none."""
    if name in _TEXT_MODES:
        return _TEXT_MODES[name]
    raise ConfigError(f"the text mode must be sequence or pooled, got {name!r}; pass text_mode (--text-mode)")
