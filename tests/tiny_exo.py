"""A tiny Exo with random weights and its autoencoder, as files that name each other."""

from collections.abc import Mapping
from pathlib import Path

from flowcore.vae.latent_spec import LatentSpec
from flowcore.weights.exo import save_exo
from tests import tiny
from tests.exo_recomputed import random_exo

SPEC = LatentSpec(name="tiny16", channels=16, downscale=8, mean=(0.1,) * 16, std=(1.5,) * 16)
MODEL, VAE = "exo.safetensors", "vae.safetensors"


def write_vae(folder: Path) -> Path:
    """Write an autoencoder of 16 channels; return its file."""
    tiny.write_vae(folder / VAE, SPEC)
    return folder / VAE


def write_parts(
    folder: Path, *, names_vae: bool = True, changes: Mapping[str, bool] | None = None, **metadata: str
) -> Path:
    """Write model and autoencoder; return the model's file, which names the other and holds its trunk.

    changes: of the configuration.
    """
    write_vae(folder)
    named = {"flowcore.vae": VAE} if names_vae else {}
    stated = {**named, "modelspec.resolution": "64x48", **metadata}
    save_exo(folder / MODEL, random_exo(**(changes or {})), metadata=stated)
    return folder / MODEL
