"""How much memory a picture of Exo takes, by arithmetic: nothing is loaded, parameters have no values.

Weights, keys and values are exact; what lives only inside a layer is estimated from the largest of them.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..models.exo import Exo, ExoConfig
from ..models.exo.config import MAX_ITERATIONS
from ..models.exo.trunk import build_trunk
from ..vae.tiling import Tiling
from .offload import decoder_layers
from .quantized import QUANTIZED

GB = 10**9
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": GB, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_CHAT = 12
"""Tokens of the chat around a prompt, at most."""
_PIXELS = 32
"""On a side of a visual token."""
_VAE_WIDTH = 128
"""Channels at full resolution of the published autoencoders."""
_VAE_MAPS = 10
"""Maps of that size which lie in memory at once while an autoencoder decodes, with its convolutions' work."""
_NF4_BLOCK, _NF4_NESTED, _NF4_TABLES = 64, 256, 4 * (16 + 256 + 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What decides the memory of a picture.

    width, height: pixels. downscale: pixels on a side of a latent. prompt_tokens: of the prompt without its
    chat. visual_tokens: of the initial image; 0 = none. branches: 2 with guidance, else 1. batch: pictures at
    once. dtype: of all that is not the trunk. trunk: dtype of the trunk, or a name of `QUANTIZED`. offload: a
    name of `OFFLOADS`. vae: parameters of the autoencoder, which is float32. vae_width: its channels at full
    resolution. tiling: which pictures it decodes in tiles. kept: prompts in the cache, with those in use.
    """

    config: ExoConfig
    width: int
    height: int
    downscale: int
    prompt_tokens: int
    visual_tokens: int = 0
    branches: int = 2
    batch: int = 1
    dtype: torch.dtype = torch.bfloat16
    trunk: str = "bfloat16"
    offload: str = "none"
    vae: int
    vae_width: int = _VAE_WIDTH
    tiling: Tiling = field(default_factory=Tiling)
    kept: int = 0

    @property
    def prefix(self) -> int:
        """Tokens of a prompt with its chat and its picture."""
        return self.prompt_tokens + _CHAT + self.visual_tokens


def parse_memory(text: str) -> int:
    """Return the bytes of a text such as 32GB, 24GiB or 512MB. Raises: ConfigError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]i?B)?\s*", text, re.IGNORECASE)
    if match is None:
        raise ConfigError(f"memory must be a number with a unit, such as 32GB or 24GiB, got {text!r}")
    return int(float(match[1]) * _UNITS[(match[2] or "").upper()])


def weight_bytes(plan: Plan) -> dict[str, int]:
    """Return the bytes of the weights of each part, wherever they lie."""
    trunk = build_trunk(plan.config.trunk, device="meta")
    layers = decoder_layers(trunk)
    text = trunk.get_submodule("language_model")
    inside = {id(tensor) for tensor in _tensors(layers)}
    rest = [tensor for tensor in _tensors(text) if id(tensor) not in inside]
    kind = torch.bfloat16 if plan.trunk in QUANTIZED else getattr(torch, plan.trunk)
    if plan.trunk in QUANTIZED:
        kind = plan.dtype
    own = Exo(_without_trunk(plan.config), device="meta")
    return {
        "trunk, embedding": _bytes(rest, kind),
        "trunk, decoder layers": _layer_bytes(layers, plan.trunk, kind),
        "trunk, vision tower": _bytes(_tensors(trunk.get_submodule("visual")), kind),
        "own parameters": _bytes(_tensors(own), plan.dtype),
        "autoencoder": 4 * plan.vae,
    }


def state_bytes(plan: Plan) -> dict[str, int]:
    """Return the bytes of what is kept of prompts and suffixes, and of the work inside layers."""
    config, text = plan.config, plan.config.trunk["text_config"]
    size, rows = _size(plan.dtype), plan.batch * plan.branches
    trunk_size = size if plan.trunk in QUANTIZED else _size(getattr(torch, plan.trunk))
    token = 2 * text["num_hidden_layers"] * text["num_key_value_heads"] * text["head_dim"] * trunk_size
    head_token = 2 * config.diffusion_depth * config.diffusion_dim * size
    room = MAX_ITERATIONS * config.suffix_length
    latents = (plan.width // plan.downscale) * (plan.height // plan.downscale)
    tokens = math.ceil(latents / config.diffusion_patch**2)
    mlp = 64 * math.ceil(8 * config.diffusion_dim / 3 / 64)
    # A block: six float32 maps of its stream, the two halves of its wide layer twice, what goes in and out.
    block = 24 * config.diffusion_dim + size * (4 * mlp + 2 * config.diffusion_dim)
    seen = config.feature_dim + config.memory_compares * config.latent_channels
    picture = seen * latents * size if plan.visual_tokens else 0
    return {
        "keys and values of the trunk": rows * (plan.prefix + room) * token,
        "keys and values of the head": rows * plan.prefix * head_token,
        "prompts in the cache": plan.kept * (plan.prefix * (token + head_token) + picture),
        "features of pictures": rows * picture,
        "work of a step": rows * ((plan.prefix + config.suffix_length) * head_token + tokens * block),
        "work of reading": rows
        * plan.prefix
        * (3 * text["intermediate_size"] + 8 * config.hidden_size)
        * trunk_size,
        "work of decoding": _VAE_MAPS * plan.vae_width * 4 * _decoded_pixels(plan),
    }


def stages(plan: Plan) -> dict[str, dict[str, int]]:
    """Return what lies on the device in each stage of a picture, in bytes by part."""
    weights, states = weight_bytes(plan), state_bytes(plan)
    everywhere = {name: weights[name] for name in ("trunk, embedding", "own parameters", "autoencoder")}
    layers, tower = weights["trunk, decoder layers"], weights["trunk, vision tower"]
    if plan.offload == "layers":
        everywhere["a decoder layer"] = math.ceil(layers / plan.config.num_layers)
    else:
        everywhere["trunk, decoder layers"] = layers
    looks = {"trunk, vision tower": tower} if plan.offload == "none" or plan.visual_tokens else {}
    if plan.offload == "none":
        everywhere |= looks
    kept = {name: states[name] for name in states if not name.startswith("work of")}
    work = {
        name.removeprefix("work of "): {name: states[name]} for name in states if name.startswith("work of")
    }
    return {
        "reading the prompt": {**everywhere, **looks, **kept, **work["reading"]},
        "steps": {**everywhere, **kept, **work["a step"]},
        "decoding": {**everywhere, **kept, **work["decoding"]},
    }


def plan_table(plan: Plan, memory: int | None = None) -> str:
    """Return the plan as text: bytes of each part, the sum of each stage, and whether it fits a memory."""
    found = stages(plan)
    parts = list(dict.fromkeys(name for stage in found.values() for name in stage))
    lines = [f"{'GB':30}" + "".join(f"{stage:>20}" for stage in found)]
    for part in parts:
        cells = "".join(f"{_gb(stage.get(part)):>20}" for stage in found.values())
        lines.append(f"{part:30}{cells}")
    sums = {stage: sum(amounts.values()) for stage, amounts in found.items()}
    lines.append(f"{'sum':30}" + "".join(f"{_gb(amount):>20}" for amount in sums.values()))
    peak = max(sums.values())
    lines.append(
        f"{plan.width} x {plan.height}, {plan.batch} at once, {plan.branches} branches, {plan.prefix} prompt "
        f"tokens, trunk {plan.trunk}, offload {plan.offload}: {_gb(peak)} GB"
    )
    if memory is not None:
        verdict = "fits" if peak <= memory else "does not fit"
        lines.append(f"{verdict} {_gb(memory)} GB" + ("" if peak <= memory else f"; {_remedy(plan)}"))
    return "\n".join(lines)


def fits(plan: Plan, memory: int) -> bool:
    """Return whether every stage fits a memory of so many bytes."""
    return max(sum(amounts.values()) for amounts in stages(plan).values()) <= memory


def _remedy(plan: Plan) -> str:
    """Return what makes the plan smaller."""
    if plan.trunk not in QUANTIZED:
        return "take a trunk of int8 or nf4 (--trunk-dtype)"
    if plan.offload == "none":
        return "let the vision tower lie on the CPU (--offload vision)"
    return "let the decoder layers lie on the CPU (--offload layers), or decode in tiles (--tile)"


def _layer_bytes(layers: nn.ModuleList, trunk: str, kind: torch.dtype) -> int:
    """Return the bytes of decoder layers, whose matrices may be quantized."""
    if trunk not in QUANTIZED:
        return _bytes(_tensors(layers), kind)
    linears = [module for module in layers.modules() if isinstance(module, nn.Linear)]
    matrices = {id(linear.weight) for linear in linears}
    rest = [tensor for tensor in _tensors(layers) if id(tensor) not in matrices]
    measure = _int8_bytes if trunk == "int8" else _nf4_bytes
    return _bytes(rest, kind) + sum(measure(linear.weight) for linear in linears)


def _int8_bytes(weight: Tensor) -> int:
    return weight.numel() + 4 * weight.shape[0]


def _nf4_bytes(weight: Tensor) -> int:
    scales = math.ceil(weight.numel() / _NF4_BLOCK)
    return math.ceil(weight.numel() / 2) + scales + 4 * math.ceil(scales / _NF4_NESTED) + _NF4_TABLES


def _decoded_pixels(plan: Plan) -> int:
    cells = plan.tiling.cells(plan.height, plan.width, plan.downscale)
    return plan.width * plan.height if cells is None else (cells * plan.downscale) ** 2


def _without_trunk(config: ExoConfig) -> ExoConfig:
    values: Mapping[str, object] = {**config.to_dict(), "embeds_trunk": False}
    return ExoConfig.from_dict(values)


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _bytes(tensors: Iterable[Tensor], kind: torch.dtype) -> int:
    """Return the bytes of parameters in a dtype, and of buffers in their own."""
    return sum(
        t.numel() * (_size(kind) if isinstance(t, nn.Parameter) else t.element_size()) for t in tensors
    )


def _size(dtype: torch.dtype) -> int:
    return torch.empty((), dtype=dtype).element_size()


def _gb(amount: int | None) -> str:
    return "-" if amount is None else f"{amount / GB:.3f}"
