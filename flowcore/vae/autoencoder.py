"""KL autoencoders (SD1.5 to FLUX.2, the bundled one) as images <-> model-space latents.

The networks are diffusers'; importing this file imports diffusers.
"""

from pathlib import Path

import torch
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor

from ..errors import ConfigError, ShapeError
from ..weights.placement import move
from .config import latent_grid
from .files import VaeFile, read_vae, save_autoencoder
from .latent_spec import LATENT_SPECS, LatentSpec
from .network import Flux2Autoencoder, build_autoencoder
from .tiling import TileCallback, Tiling, in_tiles

__all__ = ["Autoencoder", "build_autoencoder", "load_vae", "save_autoencoder"]


class Autoencoder:
    """An AutoencoderKL together with its latent space.

    The network computes in its own dtype; what goes in is cast to it, what comes out is float32. Its weights
    are frozen: they take no gradient, inputs do. `tiling` says which pictures are computed in tiles, and
    `on_tile` is told of each.
    """

    def __init__(self, module: AutoencoderKL, spec: LatentSpec, *, tiling: Tiling | None = None) -> None:
        """Join a network and a latent space; ConfigError if what a latent cell is differs."""
        grid = latent_grid(module.config)
        if grid != spec.grid:
            raise ConfigError(
                f"the latent space {spec.name} ({spec.channels} channels, 1/{spec.downscale}) must fit its "
                f"autoencoder, got {grid.channels} channels, 1/{grid.downscale}"
            )
        self.module = module.eval().requires_grad_(False)
        self.spec = spec
        self.tiling = tiling or Tiling()
        self.on_tile: TileCallback | None = None

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        device: torch.device = next(self.module.parameters()).device
        return device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        dtype: torch.dtype = next(self.module.parameters()).dtype
        return dtype

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "Autoencoder":
        """Move the weights in place and return self."""
        move(self.module, device, dtype)
        return self

    def encode(self, images: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Return model-space latents `b c h w`, float32.

        Args:
            images: `b 3 height width` in [-1, 1]; both sides multiples of `spec.downscale`.
            generator: with it a sample of the posterior is returned, without it the mode.
        Raises: ShapeError for other sizes.
        """
        side = self.spec.downscale
        if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] % side or images.shape[3] % side:
            raise ShapeError(
                f"images must be `b 3 height width` with sides that are multiples of {side}, "
                f"got {tuple(images.shape)}"
            )
        cells = self.tiling.cells(images.shape[2], images.shape[3], side)
        if cells is None:
            moments = self._moments(images)
        else:
            moments = in_tiles(self._moments, images, cells=cells, before=side, callback=self.on_tile)
        posterior = DiagonalGaussianDistribution(moments)
        raw = posterior.mode() if generator is None else posterior.sample(generator)
        return self.spec.to_model(raw.float())

    def decode(self, latents: Tensor) -> Tensor:
        """Return images `b 3 height width` in [-1, 1], float32, of model-space latents `b c h w`.

        Raises: ShapeError if the latents have other axes or channels.
        """
        raw = self.spec.from_model(latents.to(self.device, torch.float32))
        side = self.spec.downscale
        cells = self.tiling.cells(raw.shape[2] * side, raw.shape[3] * side, side)
        if cells is None:
            return self._images(raw)
        return in_tiles(self._images, raw, cells=cells, after=side, callback=self.on_tile)

    def features(self, latents: Tensor) -> Tensor:
        """Return what the decoder's middle block makes of model-space latents, `b k y x` in its dtype.

        A measure of likeness that costs a fraction of a picture; gradients run through it to the latents.
        """
        raw = self.spec.from_model(latents.to(self.device, torch.float32)).to(self.dtype)
        if isinstance(self.module, Flux2Autoencoder):
            raw = self.module.unpack(raw)
        if self.module.post_quant_conv is not None:
            raw = self.module.post_quant_conv(raw)
        decoder = self.module.decoder
        result: Tensor = decoder.mid_block(decoder.conv_in(raw))
        return result

    def _moments(self, images: Tensor) -> Tensor:
        """Return mean and log-variance of the posterior, side by side, `b 2c h w`."""
        moments: Tensor = self.module.encode(images.to(self.device, self.dtype)).latent_dist.parameters
        return moments

    def _images(self, raw: Tensor) -> Tensor:
        """Return images in [-1, 1], float32, of raw latents."""
        images: Tensor = self.module.decode(raw.to(self.dtype)).sample
        return images.float().clamp(-1.0, 1.0)


def load_vae(
    path_or_name: str | Path,
    *,
    spec: str | LatentSpec | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = torch.float32,
    tiling: Tiling | None = None,
) -> Autoencoder:
    """Return the autoencoder of a safetensors file, a diffusers folder, or a bundled name.

    Args:
        path_or_name: keys as diffusers, BFL or the original `ldm` code name them, also inside a whole
            checkpoint under `vae.` or `first_stage_model.`.
        spec: the latent space, used when the file does not state its own (SD1.5 and SDXL files do not, and
            look alike), or when it is another convention for the same autoencoder.
        device: where the weights go.
        dtype: of weights and computation; None keeps the file's.
        tiling: which pictures are computed in tiles; None = large ones.
    Raises: CheckpointError or ConfigError, naming the file.
    """
    found = read_vae(path_or_name, device=device, dtype=dtype)
    return Autoencoder(found.module, _choose_spec(found, spec), tiling=tiling).to(device)


def _choose_spec(found: VaeFile, given: str | LatentSpec | None) -> LatentSpec:
    """Return the file's latent space or the caller's; ConfigError if there is none."""
    wanted = LATENT_SPECS.get(given) if isinstance(given, str) else given
    if found.spec is not None:
        return wanted if wanted is not None and wanted.shares == found.spec.name else found.spec
    if wanted is None:
        raise ConfigError(
            f"the latent space of {found.source} must be named, as the file does not state it, got {given}; "
            f"pass spec= as one of {', '.join(found.fitting) or 'a LatentSpec'}"
        )
    return wanted
