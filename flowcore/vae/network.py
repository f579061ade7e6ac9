"""The networks: diffusers' AutoencoderKL, and FLUX.2's, which packs and normalises around it.

Importing this file imports diffusers.
"""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from einops import rearrange
from torch import Tensor, nn

from ..errors import ConfigError
from ..weights.placement import move
from .config import FLUX2_EPS, FLUX2_PATCH, checked_config


class Flux2Autoencoder(AutoencoderKL):  # type: ignore[misc]  # untyped library
    """An AutoencoderKL whose posterior and latents are packed 2 x 2 and normalised by stored statistics.

    Packing and normalising a diagonal normal distribution gives another one: that is the posterior here.
    Source: black-forest-labs/flux2 `autoencoder.py`.
    """

    def __init__(self, *, batch_norm_eps: float = FLUX2_EPS, **config: Any) -> None:
        """Take AutoencoderKL's settings, and what is added to the stored variances."""
        super().__init__(**config)
        self.register_to_config(batch_norm_eps=batch_norm_eps)
        channels = self.config["latent_channels"] * FLUX2_PATCH**2
        self.bn = nn.BatchNorm2d(channels, eps=batch_norm_eps, affine=False)

    def encode(
        self, x: Tensor, return_dict: bool = True
    ) -> AutoencoderKLOutput | tuple[DiagonalGaussianDistribution]:
        """Return the posterior of packed latents `b 4c h/2 w/2` of images `b 3 y x`."""
        mean, log_variance = (
            rearrange(part, "b c (i pi) (j pj) -> b (c pi pj) i j", pi=FLUX2_PATCH, pj=FLUX2_PATCH)
            for part in super().encode(x).latent_dist.parameters.chunk(2, dim=1)
        )
        center, spread = self._statistics(mean)
        moments = torch.cat([(mean - center) / spread, log_variance - 2 * spread.log()], dim=1)
        posterior = DiagonalGaussianDistribution(moments)
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    def decode(
        self, z: Tensor, return_dict: bool = True, generator: torch.Generator | None = None
    ) -> DecoderOutput | tuple[Tensor]:
        """Return images `b 3 y x` of packed latents `b 4c h w`."""
        return super().decode(self.unpack(z), return_dict=return_dict, generator=generator)

    def unpack(self, z: Tensor) -> Tensor:
        """Return what the decoder takes, `b c y x`, of packed latents `b 4c h w`."""
        center, spread = self._statistics(z)
        unpacked = "b (c pi pj) i j -> b c (i pi) (j pj)"
        return rearrange((z * spread + center).to(self.dtype), unpacked, pi=FLUX2_PATCH, pj=FLUX2_PATCH)

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation as `1 4c 1 1`, at least float32, on the latents' device."""
        stored = (self.get_buffer(f"bn.running_{part}") for part in ("mean", "var"))
        mean, variance = (
            part.to(like.device, torch.promote_types(part.dtype, torch.float32)).view(1, -1, 1, 1)
            for part in stored
        )
        return mean, (variance + self.bn.eps).sqrt()


def build_autoencoder(
    config: Mapping[str, Any], *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> AutoencoderKL:
    """Return a network of the given settings, with random weights, or none on the device "meta".

    Raises: ConfigError if a setting is unknown or does not fit.
    """
    values = checked_config(config, source="this VAE")
    kind = Flux2Autoencoder if "batch_norm_eps" in values else AutoencoderKL
    try:
        with torch.device(device):
            module = kind(**values)
    except (TypeError, ValueError) as err:
        raise ConfigError(
            f"settings of the VAE must fit AutoencoderKL, got {' '.join(str(err).split())}"
        ) from err
    move(module, None, dtype)
    return module
