"""Tiny random parts of a pipeline, as files that name each other: real classes, no trained weights."""

from pathlib import Path

import torch
from torch import nn

from flowcore.models.xut import XUDiT, XUTConfig
from flowcore.text.gemma3 import build_text_model, save_text_encoder
from flowcore.text.word_tokenizer import build_word_tokenizer
from flowcore.vae.autoencoder import build_autoencoder, save_autoencoder
from flowcore.vae.latent_spec import LatentSpec
from flowcore.weights.checkpoint import save_model

WORDS = ["a", "red", "green", "blue", "circle", "square", "on", "left", "of"]
CONFIG = XUTConfig(
    input_dim=4,
    dim=32,
    ctx_dim=24,
    ctx_size=16,
    heads=2,
    dim_head=16,
    mlp_dim=64,
    depth=1,
    enc_blocks=1,
    dec_blocks=1,
)
SPEC = LatentSpec(name="tiny", channels=4, downscale=8, mean=(0.1, 0.0, -0.1, 0.2), std=(1.0, 0.5, 2.0, 1.0))
MODEL, VAE, TEXT = "model.safetensors", "vae.safetensors", "text.safetensors"


def write_vae(path: Path, spec: LatentSpec) -> None:
    """Write an autoencoder of a latent space."""
    torch.manual_seed(0)
    autoencoder = build_autoencoder(
        {
            "latent_channels": spec.channels,
            "block_out_channels": [8, 8, 8, 8],
            "down_block_types": ["DownEncoderBlock2D"] * 4,
            "up_block_types": ["UpDecoderBlock2D"] * 4,
            "layers_per_block": 1,
            "norm_num_groups": 4,
        }
    )
    save_autoencoder(path, autoencoder, spec)


def write_parts(folder: Path) -> Path:
    """Write model, autoencoder and text encoder; return the model's file, which names the others."""
    generator = torch.Generator().manual_seed(0)
    model = XUDiT(CONFIG)
    with torch.no_grad():
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.2, generator=generator)
    metadata = {"flowcore.vae": VAE, "flowcore.text_encoder": TEXT, "modelspec.resolution": "32x24"}
    save_model(folder / MODEL, model.state_dict(), architecture="xut", config=CONFIG, metadata=metadata)
    write_vae(folder / VAE, SPEC)
    tokenizer = build_word_tokenizer(WORDS)
    text = build_text_model(
        {
            "vocab_size": len(tokenizer),
            "hidden_size": 24,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 12,
            "query_pre_attn_scalar": 12,
        }
    )
    save_text_encoder(folder / TEXT, text, tokenizer)
    return folder / MODEL
