"""Tiny random FLUX pipelines of diffusers, as folders."""

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
)
from torch import nn
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM, T5EncoderModel

from tests.unit.text.small import CLIP_SETTINGS, clip_network, clip_tokenizer, t5_network, t5_tokenizer

VAE = {
    "block_out_channels": (8, 8),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "latent_channels": 4,
}
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


def make_noisy(network: nn.Module) -> nn.Module:
    """Give every parameter a value of its own size."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(std=0.1, generator=generator)
    return network


def write_flux1(folder: Path) -> Path:
    """A FluxPipeline of 4 latent channels at half the size, with the embedded guidance of FLUX.1-dev."""
    torch.manual_seed(0)
    network = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=12,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=CLIP_SETTINGS["hidden_size"],
        guidance_embeds=True,
        axes_dims_rope=(4, 4, 4),
    )
    clip = clip_tokenizer()
    clip.model_max_length = 77
    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=make_noisy(AutoencoderKL(**VAE, scaling_factor=0.5, shift_factor=0.1)),
        text_encoder=clip_network(),
        tokenizer=clip,
        text_encoder_2=make_noisy(T5EncoderModel(t5_network().config)),
        tokenizer_2=t5_tokenizer(),
        transformer=make_noisy(network),
    )
    pipeline.save_pretrained(folder)
    return folder


def write_klein(folder: Path) -> Path:
    """A Flux2KleinPipeline of 16 packed channels at a quarter of the size, guided by a second evaluation."""
    torch.manual_seed(0)
    network = Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=48,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=t5_tokenizer().backend_tokenizer, pad_token="<pad>", chat_template=TEMPLATE
    )
    text = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=28,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
        )
    )
    pipeline = Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=make_noisy(AutoencoderKLFlux2(**VAE)),
        text_encoder=make_noisy(text),
        tokenizer=tokenizer,
        transformer=make_noisy(network),
    )
    pipeline.save_pretrained(folder)
    return folder
