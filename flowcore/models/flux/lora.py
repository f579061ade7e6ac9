"""Names by which LoRA files call Flux's layers, and the table of FLUX.1's control LoRAs."""

from collections.abc import Mapping, Sequence

from .config import FluxConfig
from .layouts import PLACES, Place, block_template

Rows = tuple[slice, ...]
Shapes = Mapping[str, Sequence[int]]

XLABS: Mapping[str, str] = {
    "double_blocks.{}.img_attn.qkv": "double_blocks.{}.processor.qkv_lora1",
    "double_blocks.{}.txt_attn.qkv": "double_blocks.{}.processor.qkv_lora2",
    "double_blocks.{}.img_attn.proj": "double_blocks.{}.processor.proj_lora1",
    "double_blocks.{}.txt_attn.proj": "double_blocks.{}.processor.proj_lora2",
    "single_blocks.{}.linear2": "single_blocks.{}.processor.proj_lora",
}
"""Layers that XLabs' files call otherwise."""

QKV_ONLY: Mapping[str, tuple[str, ...]] = {
    "single_blocks.{}.linear1": ("single_blocks.{}.processor.qkv_lora", "single_blocks.{}.linear1_qkv"),
}
"""Layers of which XLabs' and ComfyUI's files may change the rows of q, k and v alone."""


def diffusers_names(shapes: Shapes) -> dict[str, tuple[str, Rows]]:
    """Return diffusers' name of every layer, or of its parts: the layer, and its rows in the foreign order.

    shapes: of the weights, by the layers' own names. No rows mean all of them.
    """
    foreign: dict[str, list[tuple[str, Place]]] = {}
    for name, place in PLACES.items():
        foreign.setdefault(place.layer, []).append((name, place))
    result = {}
    for layer, (height, width) in shapes.items():
        template, number = block_template(layer)
        for name, place in foreign.get(template, []):
            result[name.format(number)] = (layer, _rows(place, height, width))
    return result


def lora_names(shapes: Shapes) -> dict[str, tuple[str, Rows]]:
    """Return every foreign name of a layer or of some of its rows, as `diffusers_names`."""
    result = diffusers_names(shapes)
    for layer, (_, width) in shapes.items():
        template, number = block_template(layer)
        if template in XLABS:
            result[XLABS[template].format(number)] = (layer, ())
        for name in QKV_ONLY.get(template, ()):
            result[name.format(number)] = (layer, (slice(0, 3 * width),))
    return result


def _rows(place: Place, height: int, width: int) -> Rows:
    """Return the rows of a layer `height width` that a foreign layer is."""
    if place.is_swapped:
        return slice(height // 2, height), slice(0, height // 2)
    if place.parts == 1:
        return ()
    return (slice(place.part * width, height if place.part == 3 else (place.part + 1) * width),)


def control_lora_shapes(config: FluxConfig, linear_shapes: Shapes, rank: int) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of a control LoRA as FLUX.1's Canny and Depth: all layers, and the q/k norms.

    linear_shapes: of the weights of the model that results, by layer. A layer that is narrower than the rank
    has its own width as rank.
    Source: black-forest-labs/flux, modules/lora.py.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for layer, (height, width) in linear_shapes.items():
        own_rank = min(rank, height, width)
        shapes[f"{layer}.lora_A.weight"] = (own_rank, width)
        shapes[f"{layer}.lora_B.weight"] = (height, own_rank)
        shapes[f"{layer}.lora_B.bias"] = (height,)
    norms = [
        f"double_blocks.{i}.{stream}_attn.norm" for i in range(config.depth) for stream in ("img", "txt")
    ]
    norms += [f"single_blocks.{i}.norm" for i in range(config.depth_single_blocks)]
    for norm in norms:
        shapes[f"{norm}.query_norm.scale"] = shapes[f"{norm}.key_norm.scale"] = (config.head_dim,)
    return shapes
