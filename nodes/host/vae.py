"""A KL autoencoder as ComfyUI's VAE. Its latents are raw, as ComfyUI has them; the MODEL normalises.

FLUX.2's are packed and normalised by the autoencoder itself, as in the ComfyUI versions that know it.
"""

import logging
from pathlib import Path

import comfy.model_management as mm
import comfy.ops
import comfy.sd
import torch
from comfy.model_patcher import ModelPatcher
from diffusers import AutoencoderKL
from torch import Tensor, nn

from ...flowcore.vae.config import latent_grid
from ...flowcore.vae.files import read_vae
from .operations import own_memory, use_operations

logger = logging.getLogger("flowcore")


class FirstStage(nn.Module):
    """Images in [-1, 1] to raw latents and back, in the calls that ComfyUI's VAE makes."""

    def __init__(self, autoencoder: AutoencoderKL) -> None:
        """Take over a network, whose layers become ComfyUI's."""
        super().__init__()
        self.autoencoder = use_operations(autoencoder, comfy.ops.disable_weight_init)

    def encode(self, images: Tensor) -> Tensor:
        """Return the mode of the posterior `b c h w` of images `b 3 y x`."""
        return self.autoencoder.encode(images).latent_dist.mode()

    def decode(self, latents: Tensor) -> Tensor:
        """Return images `b 3 y x` of raw latents `b c h w`."""
        return self.autoencoder.decode(latents).sample


def load_comfy_vae(path: Path) -> comfy.sd.VAE:
    """Return the autoencoder of a file.

    Raises: CheckpointError or ConfigError, naming the file.
    """
    logger.info("loading VAE %s", path.name)
    with torch.inference_mode(False):
        module = read_vae(path).module.eval()
        vae = comfy.sd.VAE(sd={"pixel_space_vae": torch.tensor(1.0)})  # lets every version set its attributes
        first_stage = FirstStage(own_memory(module, vae.vae_dtype))
    grid = latent_grid(module.config)
    vae.latent_channels, vae.latent_dim, vae.output_channels = grid.channels, 2, 3
    vae.downscale_ratio = vae.upscale_ratio = grid.downscale
    # ComfyUI's figures for a width of 128 in the first level, scaled to the width of this one.
    width = module.config["block_out_channels"][0] / 128
    area = grid.downscale**2
    vae.memory_used_encode = lambda shape, dtype: 1767 * shape[2] * shape[3] * mm.dtype_size(dtype) * width
    vae.memory_used_decode = lambda shape, dtype: (
        2178 * shape[2] * shape[3] * area * mm.dtype_size(dtype) * width
    )
    vae.first_stage_model = first_stage.eval()
    vae.patcher = ModelPatcher(first_stage, load_device=vae.device, offload_device=mm.vae_offload_device())
    if hasattr(vae, "size"):
        vae.size = None  # newer versions keep the size of the model they started with
    return vae
