"""Flux's tensors under the names of diffusers, both ways, and files with scaled 8-bit weights.

Original names: black-forest-labs/flux, model.py. Foreign ones: huggingface/diffusers, FluxTransformer2DModel.
`{}` stands for the number of a block.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...errors import ConfigError
from ...layers.scaled import unscaled
from ...lazy import LazyTensors, Maker
from .config import FluxConfig

LAYERS: Mapping[str, str] = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "double_blocks.{}.img_mod.lin": "transformer_blocks.{}.norm1.linear",
    "double_blocks.{}.txt_mod.lin": "transformer_blocks.{}.norm1_context.linear",
    "double_blocks.{}.img_attn.proj": "transformer_blocks.{}.attn.to_out.0",
    "double_blocks.{}.txt_attn.proj": "transformer_blocks.{}.attn.to_add_out",
    "double_blocks.{}.img_mlp.0": "transformer_blocks.{}.ff.net.0.proj",
    "double_blocks.{}.img_mlp.2": "transformer_blocks.{}.ff.net.2",
    "double_blocks.{}.txt_mlp.0": "transformer_blocks.{}.ff_context.net.0.proj",
    "double_blocks.{}.txt_mlp.2": "transformer_blocks.{}.ff_context.net.2",
    "single_blocks.{}.modulation.lin": "single_transformer_blocks.{}.norm.linear",
    "single_blocks.{}.linear2": "single_transformer_blocks.{}.proj_out",
    "final_layer.linear": "proj_out",
}
"""Layers that differ in name alone."""

FUSED: Mapping[str, tuple[str, ...]] = {
    "double_blocks.{}.img_attn.qkv": (
        "transformer_blocks.{}.attn.to_q",
        "transformer_blocks.{}.attn.to_k",
        "transformer_blocks.{}.attn.to_v",
    ),
    "double_blocks.{}.txt_attn.qkv": (
        "transformer_blocks.{}.attn.add_q_proj",
        "transformer_blocks.{}.attn.add_k_proj",
        "transformer_blocks.{}.attn.add_v_proj",
    ),
    "single_blocks.{}.linear1": (
        "single_transformer_blocks.{}.attn.to_q",
        "single_transformer_blocks.{}.attn.to_k",
        "single_transformer_blocks.{}.attn.to_v",
        "single_transformer_blocks.{}.proj_mlp",
    ),
}
"""Layers whose rows diffusers keeps as several, in this order; each but the fourth is square."""

SWAPPED: Mapping[str, str] = {"final_layer.adaLN_modulation.1": "norm_out.linear"}
"""Layers whose halves diffusers has the other way round: scale, shift instead of shift, scale."""

SCALES: Mapping[str, str] = {
    "double_blocks.{}.img_attn.norm.query_norm.scale": "transformer_blocks.{}.attn.norm_q.weight",
    "double_blocks.{}.img_attn.norm.key_norm.scale": "transformer_blocks.{}.attn.norm_k.weight",
    "double_blocks.{}.txt_attn.norm.query_norm.scale": "transformer_blocks.{}.attn.norm_added_q.weight",
    "double_blocks.{}.txt_attn.norm.key_norm.scale": "transformer_blocks.{}.attn.norm_added_k.weight",
    "single_blocks.{}.norm.query_norm.scale": "single_transformer_blocks.{}.attn.norm_q.weight",
    "single_blocks.{}.norm.key_norm.scale": "single_transformer_blocks.{}.attn.norm_k.weight",
}
"""Whole tensors that differ in name alone."""

_BLOCK = re.compile(r"(?<=_blocks\.)\d+(?=\.)")


class Place(NamedTuple):
    """Where the rows of a foreign layer are in the original one, which has `parts` such layers in a row."""

    layer: str
    part: int = 0
    parts: int = 1
    is_swapped: bool = False


PLACES: Mapping[str, Place] = {
    **{foreign: Place(layer) for layer, foreign in LAYERS.items()},
    **{
        foreign: Place(layer, part, len(parts))
        for layer, parts in FUSED.items()
        for part, foreign in enumerate(parts)
    },
    **{foreign: Place(layer, is_swapped=True) for layer, foreign in SWAPPED.items()},
}
"""Every foreign layer."""


def block_template(name: str) -> tuple[str, str]:
    """Return the name with `{}` in the place of its block's number, and the number, "" without one."""
    number = _BLOCK.search(name)
    return (_BLOCK.sub("{}", name, count=1), number[0]) if number else (name, "")


def is_diffusers(keys: Collection[str]) -> bool:
    """Return whether the names are those of diffusers."""
    norms = (
        "transformer_blocks.0.attn.norm_added_k.weight",
        "single_transformer_blocks.0.attn.norm_k.weight",
    )
    return "x_embedder.weight" in keys and any(norm in keys for norm in norms)


def from_diffusers(tensors: Mapping[str, Tensor]) -> LazyTensors:
    """Return the tensors as the original names and lays them out.

    What has no place there, and the rest of a fused layer without one of its parts, keeps its name.
    """
    makers: dict[str, Maker] = {}
    fused: dict[str, dict[int, str]] = {}
    scales = {foreign: name for name, foreign in SCALES.items()}
    for name in tensors:
        template, number = block_template(name)
        layer, _, suffix = template.rpartition(".")
        place = PLACES.get(layer)
        if template in scales:
            makers[scales[template].format(number)] = itemgetter(name)
        elif place is None:
            makers[name] = itemgetter(name)
        elif place.parts > 1:
            fused.setdefault(f"{place.layer.format(number)}.{suffix}", {})[place.part] = name
        else:
            makers[f"{place.layer.format(number)}.{suffix}"] = (
                partial(_swapped, name) if place.is_swapped else itemgetter(name)
            )
    for name, parts in fused.items():
        if len(parts) == len(FUSED[block_template(name)[0].rpartition(".")[0]]):
            makers[name] = partial(_joined, [parts[part] for part in sorted(parts)])
        else:
            makers.update({part: itemgetter(part) for part in parts.values()})
    return LazyTensors(tensors, makers)


def to_diffusers(tensors: Mapping[str, Tensor], config: FluxConfig) -> dict[str, Tensor]:
    """Return the original's tensors as diffusers names and lays them out: the inverse of `from_diffusers`.

    Raises: ConfigError if the class of diffusers cannot hold such a model.
    """
    fixed = {"mlp_dim": 4 * config.hidden_size, "theta": 10_000, "qkv_bias": True}
    for name, value in fixed.items():
        if getattr(config, name) != value:
            raise ConfigError(
                f"{name} must be {value} for the layout of diffusers, got {getattr(config, name)}; "
                "keep the original names"
            )
    result: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        template, number = block_template(name)
        layer, _, suffix = template.rpartition(".")
        if template in SCALES:
            result[SCALES[template].format(number)] = tensor
        elif layer in FUSED:
            foreign = FUSED[layer]
            widths = [config.hidden_size] * 3 + [config.mlp_dim] * (len(foreign) - 3)
            for part, rows in zip(foreign, tensor.split(widths), strict=True):
                result[f"{part.format(number)}.{suffix}"] = rows
        elif layer in SWAPPED:
            result[f"{SWAPPED[layer]}.{suffix}"] = swap_halves(tensor)
        else:
            result[f"{LAYERS[layer].format(number)}.{suffix}"] = tensor
    return result


def diffusers_config(config: FluxConfig) -> dict[str, Any]:
    """Return the config.json that stands beside a file in the layout of diffusers."""
    return {
        "_class_name": "FluxTransformer2DModel",
        "patch_size": 1,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "num_layers": config.depth,
        "num_single_layers": config.depth_single_blocks,
        "attention_head_dim": config.head_dim,
        "num_attention_heads": config.num_heads,
        "joint_attention_dim": config.context_in_dim,
        "pooled_projection_dim": config.vec_in_dim,
        "guidance_embeds": config.guidance_embed,
        "axes_dims_rope": list(config.axes_dim),
    }


def _swapped(name: str, tensors: Mapping[str, Tensor]) -> Tensor:
    return swap_halves(tensors[name])


def _joined(names: Sequence[str], tensors: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([tensors[name] for name in names])


def swap_halves(tensor: Tensor) -> Tensor:
    """Return the tensor with the first and second half of its rows exchanged."""
    first, second = tensor.chunk(2)
    return torch.cat((second, first))


def is_scaled(keys: Collection[str]) -> bool:
    """Return whether weights are stored with a scale each, to be multiplied with."""
    return "scaled_fp8" in keys or any(key.endswith(".scale_weight") for key in keys)


def from_scaled(tensors: Mapping[str, Tensor]) -> LazyTensors:
    """Return the true weights in bfloat16, under the original names; scales of inputs are dropped."""
    result = unscaled(tensors)
    return from_diffusers(result) if is_diffusers(result) else result
