"""Small models with random weights, written by flowcore's own functions into a ComfyUI models folder."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import nn

from flowcore.flux import Fourier, Points, Space, SpacePair
from flowcore.layers.norm import RMSNorm
from flowcore.models import find_architecture
from flowcore.models.flux import PRESETS as FLUX
from flowcore.models.single_stream import PRESETS as SINGLE_STREAM
from flowcore.models.tinyflux import PRESETS as TINYFLUX
from flowcore.models.xut import XUDiT, XUTConfig
from flowcore.text import t5gemma2
from flowcore.text.gemma3 import build_text_model, save_text_encoder
from flowcore.text.word_tokenizer import build_word_tokenizer
from flowcore.vae.autoencoder import save_autoencoder
from flowcore.vae.latent_spec import LatentSpec
from flowcore.weights.atomic import write_tensors
from flowcore.weights.checkpoint import save_model
from tests.unit.text.small import randomise, write_folders

MODEL, TEXT, VAE, LORA = (
    "standin-xut.safetensors",
    "standin-text.safetensors",
    "standin-vae.safetensors",
    "standin-lora.safetensors",
)
SEQUENCES = "standin-sequences.safetensors"
T5, CLIP, T5GEMMA2 = "t5/model.safetensors", "clip/model.safetensors", "standin-t5gemma2.safetensors"
WORDS = [
    "a",
    "red",
    "green",
    "blue",
    "circle",
    "square",
    "star",
    "left",
    "right",
    "of",
    "above",
    "below",
    "the",
    "on",
    "white",
    "black",
    "background",
]
WIDTH = 32
CONFIG = XUTConfig(
    input_dim=16, dim=64, ctx_dim=WIDTH, ctx_size=8, heads=4, dim_head=16, mlp_dim=96, depth=2, dec_blocks=1
)
SMALL: dict[str, Any] = {
    "flux": replace(FLUX["tiny"], in_channels=64, out_channels=64, guidance_embed=True),
    "tinyflux": replace(TINYFLUX["tiny"], in_channels=16),
    "single_stream": SINGLE_STREAM["tiny"],
}
"""Configurations that fit the other stand-ins, by architecture."""
CURVE = Fourier(harmonics=3, count=24)
SPEC = LatentSpec(
    name="standin",
    channels=16,
    downscale=8,
    mean=tuple(0.1 * i for i in range(16)),
    std=tuple(1 + 0.1 * i for i in range(16)),
)
LORA_TARGETS = (
    "backbone.enc_blocks.0.0.attn.qkv",
    "backbone.dec_blocks.1.0.mlp.w3",
    "ctx_proj",
    "in_patch.proj",
)


def write_standins(models: Path) -> None:
    """Write a model, a text encoder, a VAE and a LoRA under their folders in a ComfyUI models folder."""
    for folder in ("diffusion_models", "text_encoders", "vae", "loras"):
        (models / folder).mkdir(parents=True, exist_ok=True)
    write_model(models / "diffusion_models" / MODEL)
    for name, config in SMALL.items():
        write_model(models / "diffusion_models" / file_of(name), architecture=name, config=config)
        write_whole_lora(models / "loras" / file_of(name), architecture=name, config=config)
    write_sequences(models / "diffusion_models" / SEQUENCES)
    write_text(models / "text_encoders" / TEXT)
    write_folders(models / "text_encoders")
    write_t5gemma2(models / "text_encoders" / T5GEMMA2)
    write_vae(models / "vae" / VAE)
    write_lora(models / "loras" / LORA)


def file_of(architecture: str) -> str:
    """The name of an architecture's stand-in."""
    return f"standin-{architecture}.safetensors"


def write_model(
    path: Path,
    *,
    seed: int = 1,
    architecture: str = "xut",
    config: Any = CONFIG,
) -> None:
    """Write a model whose every weight counts, also those that training starts at zero."""
    model = _randomised(find_architecture(architecture).model(config), seed)
    metadata = {
        "flowcore.latents_mean": _json(SPEC.mean),
        "flowcore.latents_std": _json(SPEC.std),
        "flowcore.latent_rgb_factors": _json(
            [[0.1 * (i % 3), 0.05, -0.02 * i] for i in range(SPEC.channels)]
        ),
        "flowcore.latent_rgb_bias": "[0.0, 0.1, -0.1]",
        "flowcore.text_encoder": TEXT,
        "flowcore.vae": VAE,
        "flowcore.text_mode": "sequence",
    }
    save_model(path, model.state_dict(), architecture=architecture, config=config, metadata=metadata)


def write_sequences(path: Path) -> None:
    """Write a Flux from closed curves of three harmonics to their 24 points, as training writes it."""
    curves = CURVE.decode(torch.randn(64, CURVE.harmonics, CURVE.channels, generator=_generator(6)))
    data = Space.fit(Points(count=CURVE.count, dim=2), curves)
    spaces = SpacePair(condition=Space.fit(CURVE, curves), data=data)
    config = FLUX["points"]
    model = _randomised(find_architecture("flux").model(config), 7)
    save_model(path, model.state_dict(), architecture="flux", config=config, metadata=spaces.to_metadata())


def write_text(path: Path) -> None:
    """Write a Gemma-3 of two layers with a tokenizer of whole words."""
    tokenizer = build_word_tokenizer(WORDS)
    config = {
        "vocab_size": len(tokenizer), "hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "query_pre_attn_scalar": 16,
        "max_position_embeddings": 128, "sliding_window": 64, "pad_token_id": 0, "eos_token_id": 1,
        "bos_token_id": 2,
    }  # fmt: skip
    torch.manual_seed(2)
    save_text_encoder(path, build_text_model(config), tokenizer)


def write_t5gemma2(path: Path) -> None:
    """Write a T5Gemma2 text encoder of two layers with the same tokenizer."""
    tokenizer = build_word_tokenizer(WORDS)
    settings = {
        "vocab_size": len(tokenizer), "hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "query_pre_attn_scalar": 16,
        "sliding_window": 300, "layer_types": ["sliding_attention", "full_attention"], "pad_token_id": 0,
        "eos_token_id": 1, "bos_token_id": 2, "model_type": "t5gemma2_text",
    }  # fmt: skip
    network = randomise(t5gemma2.build_network(settings, source=path.name), 5)
    t5gemma2.save_text_encoder(path, t5gemma2.T5Gemma2TextEncoder(network, tokenizer, padding_side="left"))


def write_vae(path: Path) -> None:
    """Write a KL autoencoder of the demo's layout, narrower."""
    torch.manual_seed(3)
    module = AutoencoderKL(
        latent_channels=16, block_out_channels=(8, 8, 16, 16), norm_num_groups=4, layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        use_quant_conv=False, use_post_quant_conv=False, mid_block_add_attention=True,
    )  # fmt: skip
    save_autoencoder(path, module, SPEC)


def write_lora(path: Path, rank: int = 2) -> None:
    """Write a LoRA in the key form that training exports."""
    shapes = {name: tensor.shape for name, tensor in XUDiT(CONFIG, device="meta").state_dict().items()}
    generator = _generator(4)
    tensors = {}
    for target in LORA_TARGETS:
        rows, columns, *kernel = shapes[f"{target}.weight"]
        one = [1] * len(kernel)
        tensors[f"diffusion_model.{target}.lora_A.weight"] = (
            torch.randn(rank, columns, *kernel, generator=generator) * 0.3
        )
        tensors[f"diffusion_model.{target}.lora_B.weight"] = (
            torch.randn(rows, rank, *one, generator=generator) * 0.3
        )
        tensors[f"diffusion_model.{target}.alpha"] = torch.tensor(float(rank))
    norm = "backbone.enc_blocks.0.0.attn_pre_norm.norm"
    tensors[f"diffusion_model.{norm}.diff"] = torch.randn(shapes[f"{norm}.weight"], generator=generator) * 0.1
    write_tensors(path, tensors, {"flowcore.arch": "xut"})


def write_whole_lora(path: Path, *, architecture: str, config: Any, rank: int = 2) -> None:
    """Write a LoRA of every linear layer of a model, and a change of every norm's weight."""
    generator = _generator(4)
    model = find_architecture(architecture).model(config, device="meta")
    tensors = {}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear):
            down, up = (rank, layer.in_features), (layer.out_features, rank)
            tensors[f"diffusion_model.{name}.lora_A.weight"] = torch.randn(down, generator=generator) * 0.1
            tensors[f"diffusion_model.{name}.lora_B.weight"] = torch.randn(up, generator=generator) * 0.1
        elif isinstance(layer, RMSNorm):
            change = torch.randn(layer.weight.shape, generator=generator) * 0.1
            tensors[f"diffusion_model.{name}.diff"] = change
    write_tensors(path, tensors, {"flowcore.arch": architecture})


def _randomised(model: nn.Module, seed: int) -> nn.Module:
    generator = _generator(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                fan_in = parameter[0].numel()
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.6 * fan_in**-0.5)
            else:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _json(values: object) -> str:
    import json

    return json.dumps(values)
