"""A small Flux model's weights and adapters of them, for the tests of LoRA files."""

import torch
from torch import Tensor

from flowcore.models import find_architecture
from flowcore.models.flux import Flux, FluxConfig
from flowcore.weights.lora import Lora, parse_lora
from flowcore.weights.lora_writing import LoraPair

ROW = find_architecture("flux")
CONFIG = FluxConfig(
    in_channels=4,
    out_channels=4,
    vec_in_dim=4,
    context_in_dim=5,
    hidden_size=16,
    num_heads=1,
    depth=1,
    depth_single_blocks=1,
    axes_dim=(8, 8),
)
QKV, LINEAR1 = "double_blocks.0.img_attn.qkv", "single_blocks.0.linear1"
PROJ = "double_blocks.0.txt_attn.proj"
RANK, ALPHA = 3, 6.0
LIMIT = 1e-6


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def random_state() -> dict[str, Tensor]:
    return {name: draw(*t.shape, seed=7) for name, t in Flux(CONFIG, device="meta").state_dict().items()}


def pair(layer: str, state: dict[str, Tensor], alpha: float = ALPHA) -> LoraPair:
    height, width = state[f"{layer}.weight"].shape
    return LoraPair(draw(RANK, width), draw(height, RANK), alpha)


def parse(tensors: dict[str, Tensor], state: dict[str, Tensor], **metadata: str) -> Lora:
    return parse_lora(tensors, metadata, state, ROW, source="file")
