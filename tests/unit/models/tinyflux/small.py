"""A small TinyFlux with random weights, and inputs for it."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from flowcore.models.tinyflux import TinyFlux, TinyFluxConfig

CONFIG = TinyFluxConfig(
    hidden_size=32,
    num_attention_heads=2,
    attention_head_dim=16,
    in_channels=4,
    joint_attention_dim=12,
    pooled_projection_dim=10,
    num_double_layers=1,
    num_single_layers=2,
    axes_dims_rope=(4, 6, 6),
    lune_expert_dim=20,
    lune_hidden_dim=8,
    lune_dropout=0.0,
    sol_spatial_size=4,
    sol_hidden_dim=8,
)
BARE = replace(CONFIG, use_lune_expert=False, use_sol_prior=False, use_t5_vec=False)
SIZE = (3, 4)


def random_model(config: TinyFluxConfig = CONFIG) -> TinyFlux:
    """A model in which every parameter has an effect."""
    model = TinyFlux(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_norm = name.endswith(("norm.weight", "norm2.weight", "output_proj.0.weight"))
            nn.init.normal_(parameter, 1.0 if is_norm else 0.0, 0.2, generator=generator)
    return model.eval()


def inputs(batch: int = 2, size: tuple[int, int] = SIZE, tokens: int = 5) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(batch, size[0] * size[1], 4, generator=generator),
        "encoder_hidden_states": torch.randn(batch, tokens, 12, generator=generator),
        "pooled_projections": torch.randn(batch, 10, generator=generator),
        "timestep": torch.rand(batch, generator=generator),
        "size": size,
    }


def teachers(batch: int = 2) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return {
        "lune_features": torch.randn(batch, 20, generator=generator),
        "sol_stats": torch.rand(batch, 3, generator=generator),
        "sol_spatial": torch.rand(batch, 4, 4, generator=generator),
    }


def row(given: dict[str, Any], index: int) -> dict[str, Any]:
    """One sample of a batch."""
    return {
        name: value[index : index + 1] if isinstance(value, Tensor) else value
        for name, value in given.items()
    }
