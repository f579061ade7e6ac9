"""Files of autoencoders: the network with its weights, and which latent space it has."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from ..assets import resolve
from ..errors import CheckpointError
from ..lazy import renamed
from ..weights.atomic import write_tensors
from ..weights.checkpoint import read_tensors
from ..weights.strict import assign_strict
from .config import FLUX2_CLASS, checked_config, infer_config, latent_grid
from .keys import find_prefix, to_diffusers
from .latent_spec import (
    LATENT_SPECS,
    LatentGrid,
    LatentSpec,
    fitting_spaces,
    scaled_spec,
    spec_from_metadata,
    spec_from_statistics,
)
from .network import build_autoencoder

FOLDER_WEIGHTS = "diffusion_pytorch_model.safetensors"
_STATISTICS = ("vae_mean", "vae_std")


@dataclass(frozen=True, slots=True, kw_only=True)
class VaeFile:
    """An autoencoder as its file has it.

    spec: the latent space that the file states or that only fits; None = it may be any of `fitting`.
    """

    source: str
    module: AutoencoderKL
    spec: LatentSpec | None
    fitting: tuple[str, ...]


def read_vae(
    path_or_name: str | Path, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> VaeFile:
    """Return the network of a file, a folder or a bundled name.

    dtype: of its weights; None = as stored.
    Raises: CheckpointError or ConfigError, naming the file.
    """
    path = resolve(path_or_name)
    tensors, metadata, stated = _read(path)
    prefix = find_prefix(tensors, source=path.name)
    own = {name.removeprefix(prefix): name for name in tensors if name.startswith(prefix)}
    state = to_diffusers(renamed(tensors, {new: own[new] for new in own if new not in _STATISTICS}))
    config = checked_config(stated, source=path.name) if stated else infer_config(state, source=path.name)
    module = build_autoencoder(config, device="meta")
    assign_strict(module, state, source=path.name, what=_class_of(config), device=device, dtype=dtype)
    grid = latent_grid(module.config)
    fitting = fitting_spaces(grid, tensors)
    only = LATENT_SPECS[fitting[0]] if len(fitting) == 1 else None
    spec = (
        _tensor_spec(tensors, prefix)
        or spec_from_metadata(metadata, source=path.name, downscale=grid.downscale, patch=grid.patch)
        or _config_spec(config, grid)
        or only
    )
    return VaeFile(source=path.name, module=module, spec=spec, fitting=fitting)


def save_autoencoder(
    path: str | Path, module: AutoencoderKL, spec: LatentSpec, *, metadata: Mapping[str, str] | None = None
) -> None:
    """Write network, settings and latent space to one safetensors file, replacing an earlier one."""
    config = {key: value for key, value in module.config.items() if not key.startswith("_")}
    own = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": _class_of(config),
        "flowcore.config": json.dumps(config),
        "flowcore.latent_spec": spec.name,
        "flowcore.latents_mean": json.dumps(list(spec.mean)),
        "flowcore.latents_std": json.dumps(list(spec.std)),
    }
    write_tensors(path, module.state_dict(), {**(metadata or {}), **own})


def _class_of(config: Mapping[str, Any]) -> str:
    """Return what diffusers calls the network of the settings."""
    return FLUX2_CLASS if "batch_norm_eps" in config else "AutoencoderKL"


def _read(path: Path) -> tuple[Mapping[str, Tensor], dict[str, str], dict[str, Any]]:
    """Return tensors, string metadata, and the settings that the file or the folder states ({} if none)."""
    if not path.is_dir():
        tensors, metadata = read_tensors(path)
        return (
            tensors,
            metadata,
            _json(metadata.get("flowcore.config", "{}"), f"flowcore.config in {path.name}"),
        )
    config = path / "config.json"
    if not config.is_file() or not (path / FOLDER_WEIGHTS).is_file():
        raise CheckpointError(
            f"a VAE folder must hold config.json and {FOLDER_WEIGHTS}, got {path} without them"
        )
    tensors, metadata = read_tensors(path / FOLDER_WEIGHTS)
    return tensors, metadata, _json(config.read_text(encoding="utf-8"), str(config))


def _json(text: str, source: str) -> dict[str, Any]:
    """Return the JSON object of a text."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as err:
        raise CheckpointError(f"{source} must be a JSON object, got {err}") from err
    if not isinstance(value, dict):
        raise CheckpointError(f"{source} must be a JSON object, got {type(value).__name__}")
    return value


def _tensor_spec(tensors: Mapping[str, Tensor], prefix: str) -> LatentSpec | None:
    """Return the space stored as tensors: single-file EQ checkpoints hold `vae_mean` and `vae_std`."""
    for start in ("", prefix):
        if f"{start}vae_mean" in tensors and f"{start}vae_std" in tensors:
            mean, std = (tensors[f"{start}vae_{part}"].float().flatten().tolist() for part in ("mean", "std"))
            return spec_from_statistics(mean, std)
    return None


def _config_spec(config: Mapping[str, Any], grid: LatentGrid) -> LatentSpec | None:
    """Return the space that the settings state, as the files of diffusers do."""
    if config.get("latents_mean") and config.get("latents_std"):
        mean, std = config["latents_mean"], config["latents_std"]
    elif "scaling_factor" in config:
        scale, shift = config["scaling_factor"], config.get("shift_factor") or 0.0
        scaled = scaled_spec("custom", channels=grid.channels, scale=scale, shift=shift)
        mean, std = scaled.mean, scaled.std
    else:
        return None
    return spec_from_statistics(mean, std, downscale=grid.downscale, patch=grid.patch)
