"""The latent spaces: the only place for latent constants.

Raw latents are what an autoencoder's encoder puts out; model-space latents are what the diffusion models see.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import CheckpointError, ConfigError, ShapeError


class LatentGrid(NamedTuple):
    """What a latent cell is: numbers in it, pixels a side, and encoder cells a side that lie in it."""

    channels: int
    downscale: int
    patch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentSpec:
    """One latent space: model space = (raw - mean) / std per channel.

    A latent cell covers a square of `downscale` pixels a side. The autoencoder makes it of `patch` x `patch`
    cells of its encoder, whose channels lie side by side. shares: the space whose autoencoder this one has,
    where models of two conventions use the same file.
    """

    name: str
    channels: int
    downscale: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    patch: int = 1
    shares: str = ""

    def __post_init__(self) -> None:
        """Check that every channel has its statistics."""
        if len(self.mean) != self.channels or len(self.std) != self.channels:
            raise ConfigError(
                f"latent mean and std of {self.name} must have {self.channels} values, "
                f"got {len(self.mean)} and {len(self.std)}"
            )
        if min(self.std) <= 0:
            raise ConfigError(f"latent std of {self.name} must be positive, got {min(self.std)}")

    @property
    def grid(self) -> LatentGrid:
        """What a latent cell is."""
        return LatentGrid(self.channels, self.downscale, self.patch)

    def to_model(self, raw: Tensor) -> Tensor:
        """Return model-space latents `b c h w` of raw latents `b c h w`, in the input's dtype."""
        mean, std = self._statistics(raw)
        return (raw - mean) / std

    def from_model(self, latents: Tensor) -> Tensor:
        """Return raw latents `b c h w` of model-space latents `b c h w`, in the input's dtype."""
        mean, std = self._statistics(latents)
        return latents * std + mean

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and std as `1 c 1 1` on the device and in the dtype of the latents."""
        if like.ndim != 4 or like.shape[1] != self.channels:
            raise ShapeError(f"{self.name} latents must be `b {self.channels} h w`, got {tuple(like.shape)}")
        mean, std = (
            torch.tensor(values, device=like.device, dtype=like.dtype).view(1, -1, 1, 1)
            for values in (self.mean, self.std)
        )
        return mean, std


def scaled_spec(
    name: str,
    *,
    channels: int,
    scale: float,
    shift: float = 0.0,
    downscale: int = 8,
    patch: int = 1,
    shares: str = "",
) -> LatentSpec:
    """Return the spec of a space given as scale * (raw - shift), one scale and shift for all channels."""
    return LatentSpec(
        name=name,
        channels=channels,
        downscale=downscale,
        mean=(shift,) * channels,
        std=(1.0 / scale,) * channels,
        patch=patch,
        shares=shares,
    )


# Source: the published autoencoder configs; eq-sdxl is KBlueLeaf's EQ-SDXL-VAE (latents_mean, latents_std);
# flux1-unshifted is FLUX.1's VAE as TinyFlux and SingleStreamDiT were trained on it, without the shift.
# flux2's autoencoder normalises by statistics of its own file, so that its raw latents are the model's.
LATENT_SPECS: dict[str, LatentSpec] = {
    spec.name: spec
    for spec in (
        scaled_spec("sd15", channels=4, scale=0.18215),
        scaled_spec("sdxl", channels=4, scale=0.13025),
        LatentSpec(
            name="eq-sdxl",
            channels=4,
            downscale=8,
            mean=(-3.865960634760459, -1.3353925720045965, 0.8353661802812418, 0.909888159310023),
            std=(10.036514488374861, 6.848430044716239, 7.213817552213277, 5.591315799887989),
        ),
        scaled_spec("sd3", channels=16, scale=1.5305, shift=0.0609),
        scaled_spec("flux1", channels=16, scale=0.3611, shift=0.1159),
        scaled_spec("flux1-unshifted", channels=16, scale=0.3611, shares="flux1"),
        scaled_spec("flux2", channels=128, scale=1.0, downscale=16, patch=2),
    )
}


# What stands beside the autoencoder in a whole checkpoint, and the space that its diffusion model works in.
_NEIGHBOURS = {
    "conditioner.embedders.": "sdxl",
    "cond_stage_model.": "sd15",
    "model.diffusion_model.joint_blocks.": "sd3",
    "model.diffusion_model.double_blocks.": "flux1",
}


def fitting_spaces(grid: LatentGrid, names: Collection[str]) -> tuple[str, ...]:
    """Return the names of the known spaces that an autoencoder in a file of these tensor names can have."""
    for start, space in _NEIGHBOURS.items():
        if LATENT_SPECS[space].grid == grid and any(name.startswith(start) for name in names):
            return (space,)
    return tuple(spec.name for spec in LATENT_SPECS.values() if spec.grid == grid)


def spec_from_statistics(
    mean: Sequence[float],
    std: Sequence[float],
    *,
    name: str = "custom",
    downscale: int = 8,
    patch: int = 1,
) -> LatentSpec:
    """Return the spec of per-channel statistics read from a file.

    When they agree with a known space to float16 precision (files round them), the known space is returned
    with its exact constants.
    """
    for spec in LATENT_SPECS.values():
        is_placed = spec.name == name or (spec.downscale, spec.patch) == (downscale, patch)
        if is_placed and _is_close(spec.mean, mean) and _is_close(spec.std, std):
            return spec
    return LatentSpec(
        name=name, channels=len(mean), downscale=downscale, mean=tuple(mean), std=tuple(std), patch=patch
    )


def spec_from_metadata(
    metadata: Mapping[str, str], *, source: str, downscale: int = 8, patch: int = 1
) -> LatentSpec | None:
    """Return the latent space that a file's metadata states, None if it states none.

    `flowcore.latents_mean` and `flowcore.latents_std` are JSON lists with a value for each channel;
    `flowcore.latent_spec` names the space, which without them must be a known one.
    Raises: CheckpointError if what the file states cannot be read.
    """
    name = metadata.get("flowcore.latent_spec")
    mean, std = (_numbers(metadata, f"flowcore.latents_{part}", source) for part in ("mean", "std"))
    if mean is not None and std is not None:
        return spec_from_statistics(mean, std, name=name or "custom", downscale=downscale, patch=patch)
    if name is None:
        return None
    if name not in LATENT_SPECS:
        raise CheckpointError(
            f"flowcore.latent_spec in {source} must be one of {', '.join(LATENT_SPECS)}, or come with "
            f"flowcore.latents_mean and flowcore.latents_std, got {name!r}"
        )
    return LATENT_SPECS[name]


def _numbers(metadata: Mapping[str, str], key: str, source: str) -> list[float] | None:
    """Return the list of numbers under a key, None if there is none."""
    if key not in metadata:
        return None
    try:
        values = json.loads(metadata[key])
    except json.JSONDecodeError:
        values = None
    if not isinstance(values, list) or not all(isinstance(value, int | float) for value in values):
        raise CheckpointError(f"{key} in {source} must be a JSON list of numbers, got {metadata[key][:40]!r}")
    return [float(value) for value in values]


def _is_close(exact: Sequence[float], stored: Sequence[float]) -> bool:
    """Say whether the stored values are the exact ones to one unit of float16 (2^-10 relative)."""
    return len(exact) == len(stored) and all(
        abs(a - b) <= 2.0**-10 * max(abs(a), 2.0**-14) for a, b in zip(exact, stored, strict=True)
    )
