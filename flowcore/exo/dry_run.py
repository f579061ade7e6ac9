"""The memory plan of a preset or of a model file: sizes are read, weights are not."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..assets import resolve
from ..devices import find_dtype
from ..errors import CheckpointError, ConfigError
from ..models.exo import PRESETS, ExoConfig
from ..parts import Source, stated_size
from ..text.qwen3_vl import CELL, LEAST, MOST, ByteTokenizer
from ..vae.config import latent_grid
from ..vae.files import read_vae
from ..vae.tiling import tiling_of
from ..weights.checkpoint import read_tensors
from ..weights.recognition import recognise
from .loading import TrunkOptions, byte_tokenizer, vae_source
from .memory_plan import Plan
from .prefixes import KEPT

_BYTES_A_TOKEN = 3
"""Of a prompt for a published trunk, about."""
_SMALL_VAE = "scenes-vae"
_SIZE = (1024, 1024)


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What is to be planned. width, height: pixels; None = the model's own. batch: pictures at once."""

    prompt: str = ""
    width: int | None = None
    height: int | None = None
    has_picture: bool = False
    is_guided: bool = True
    batch: int = 1
    dtype: str = "bfloat16"
    trunk: TrunkOptions = field(default_factory=TrunkOptions)
    tile: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoder:
    """An autoencoder's parameters, pixels on a side of a latent, channels at full resolution."""

    parameters: int
    downscale: int
    width: int = 128


PUBLISHED: Mapping[int, Decoder] = {
    128: Decoder(parameters=84_046_115, downscale=16),
    64: Decoder(parameters=83_819_683, downscale=16),
    16: Decoder(parameters=83_819_683, downscale=8),
}
"""The autoencoders of FLUX by channels of the latents: FLUX.2, FLUX.1 packed, FLUX.1."""


def preset_plan(name: str, request: Request) -> Plan:
    """Return the plan of a preset, at 1024 x 1024 if the request has no size. Raises: ConfigError."""
    if name not in PRESETS:
        raise ConfigError(f"presets of exo must be among {', '.join(PRESETS)}, got {name!r}")
    config = PRESETS[name]
    decoder = _decoder_of(_SMALL_VAE) if config.embeds_trunk else PUBLISHED[config.latent_channels]
    return _plan(config, decoder, request, _SIZE)


def file_plan(model: Source, request: Request, *, vae: Source | None = None) -> Plan:
    """Return the plan of a model file. Raises: CheckpointError or ConfigError, naming the file."""
    path = resolve(model)
    tensors, metadata = read_tensors(path)
    found = recognise(tensors, metadata)
    if found.architecture.name != "exo":
        raise ConfigError(
            f"a memory plan must be of an exo model, got {found.architecture.name} in {path.name}"
        )
    config = found.architecture.infer_config(found.state, found.metadata)
    return _plan(
        config, _decoder(vae, found.metadata, path, config), request, stated_size(found.metadata) or _SIZE
    )


def _plan(config: ExoConfig, decoder: Decoder, request: Request, default: tuple[int, int]) -> Plan:
    """Return the plan of a configuration, with what the request leaves open."""
    options = request.trunk
    options.check(torch.device("meta"))
    width, height = request.width or default[0], request.height or default[1]
    branches = 2 if request.is_guided else 1
    dtype = find_dtype(request.dtype, torch.device("meta"))
    trunk = str(dtype).removeprefix("torch.") if options.dtype == "auto" else options.dtype
    reads_bytes = byte_tokenizer(config)
    return Plan(
        config=config,
        width=width,
        height=height,
        downscale=decoder.downscale,
        prompt_tokens=_prompt_tokens(request.prompt, reads_bytes),
        visual_tokens=_visual_tokens(width, height, reads_bytes is None) if request.has_picture else 0,
        branches=branches,
        batch=request.batch,
        dtype=dtype,
        trunk=trunk,
        offload=options.offload,
        vae=decoder.parameters,
        vae_width=decoder.width,
        tiling=tiling_of(request.tile),
        kept=min(branches, KEPT),
    )


def _prompt_tokens(prompt: str, reads_bytes: ByteTokenizer | None) -> int:
    if reads_bytes is not None:
        return len(reads_bytes.ids(prompt))
    return math.ceil(len(prompt.encode()) / _BYTES_A_TOKEN)


def _visual_tokens(width: int, height: int, is_published: bool) -> int:
    count = max(1, round(width / CELL)) * max(1, round(height / CELL))
    return min(max(count, LEAST), MOST) if is_published else min(count, MOST)


def _decoder(vae: Source | None, metadata: Mapping[str, str], path: Path, config: ExoConfig) -> Decoder:
    """Return the autoencoder that a file names, or the published one where it is not here."""
    try:
        return _decoder_of(vae_source(vae, metadata, path))
    except CheckpointError:
        if vae is not None or config.latent_channels not in PUBLISHED:
            raise
        return PUBLISHED[config.latent_channels]


def _decoder_of(source: Source) -> Decoder:
    module: Any = read_vae(source).module
    return Decoder(
        parameters=sum(p.numel() for p in module.parameters()),
        downscale=latent_grid(module.config).downscale,
        width=module.config["block_out_channels"][0],
    )
