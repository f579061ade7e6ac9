"""A tiny Exo with random weights and its autoencoder, as files that name each other."""

from pathlib import Path

import torch

from flowcore.vae.autoencoder import build_autoencoder, save_autoencoder
from flowcore.vae.latent_spec import LatentSpec
from flowcore.weights.exo import save_exo
from tests.exo_recomputed import random_exo

SPEC = LatentSpec(name="tiny16", channels=16, downscale=8, mean=(0.1,) * 16, std=(1.5,) * 16)
MODEL, VAE = "exo.safetensors", "vae.safetensors"


def write_vae(folder: Path) -> Path:
    """Write an autoencoder of 16 channels; return its file."""
    torch.manual_seed(0)
    autoencoder = build_autoencoder(
        {
            "latent_channels": 16,
            "block_out_channels": [8, 8, 8, 8],
            "down_block_types": ["DownEncoderBlock2D"] * 4,
            "up_block_types": ["UpDecoderBlock2D"] * 4,
            "layers_per_block": 1,
            "norm_num_groups": 4,
        }
    )
    save_autoencoder(folder / VAE, autoencoder, SPEC)
    return folder / VAE


def write_parts(folder: Path, **metadata: str) -> Path:
    """Write model and autoencoder; return the model's file, which names the other and holds its trunk."""
    write_vae(folder)
    stated = {"flowcore.vae": VAE, "modelspec.resolution": "64x48", **metadata}
    save_exo(folder / MODEL, random_exo(), metadata=stated)
    return folder / MODEL
