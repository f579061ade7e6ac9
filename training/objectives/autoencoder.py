"""Reconstruction objective of the demo's AutoencoderKL: crops that show something, plain pixel losses."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from flowcore.vae.latent_spec import LatentSpec
from flowcore.vae.preview import fit_rgb_factors
from training.data.buckets import Bucket
from training.data.images import load_image
from training.data.order import BatchOrder
from training.data.sample import Sample
from training.grid import save_grid
from training.keys import generator
from training.stop import StopFlag

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

CROP_CANDIDATES = 3
WHOLE_EVERY = 20
MSE_WEIGHT, L1_WEIGHT, KL_WEIGHT = 2.0, 0.5, 3e-5


class AutoencoderObjective:
    """Mean of 2 MSE + 0.5 L1 + 3e-5 KL over square crops; every twentieth batch sees whole pictures.

    Of three crops drawn for a sample the one with the most detail is taken: flat background teaches nothing.
    """

    def __init__(
        self,
        module: AutoencoderKL,
        samples: Sequence[Sample],
        held_out: Sequence[Sample],
        *,
        seed: int,
        batch_size: int,
        crop: int,
        device: torch.device,
        stop: StopFlag,
    ) -> None:
        """Reads all images into memory as bytes (they must have the first one's size)."""
        self.module: nn.Module = module.to(device)
        self.autoencoder = module
        self.seed, self.batch_size, self.crop, self.device = seed, batch_size, crop, device
        self.images = load_images(samples, stop)
        self.held_out = load_images(held_out, stop)
        self.order = BatchOrder(seed, (len(samples),), batch_size)

    def batch_keys(self, step: int) -> tuple[str, list[str]]:
        """Size of the crops and numbers of the pictures of a step's global batch."""
        return f"{self.crop}x{self.crop}", [str(number) for number in self.order.batch(step)[1]]

    def loss(self, step: int, part: slice) -> Tensor:
        """Reconstruction loss of samples `part` of a step's batch."""
        whole = step % WHOLE_EVERY == WHOLE_EVERY - 1
        _, numbers = self.order.batch(step)
        crops, noises = [], []
        for position, number in list(enumerate(numbers))[part]:
            draw = generator(self.seed, "crop", step, position)
            crops.append(
                self.images[number] if whole else detailed_crop(self.images[number], self.crop, draw)
            )
            side = crops[-1].shape[-1] // 8
            noises.append(torch.randn(self.autoencoder.config.latent_channels, side, side, generator=draw))
        pixels = to_pixels(torch.stack(crops)).to(self.device)
        return reconstruction_loss(self.autoencoder, pixels, torch.stack(noises).to(self.device))

    def preview(self, folder: Path, step: int, stop: StopFlag) -> dict[str, float]:
        """Originals above reconstructions, and PSNR over the held-out pictures in dB."""
        pixels, rebuilt = to_pixels(self.held_out), []
        for first in range(0, len(pixels), 32):
            stop.check()
            batch = pixels[first : first + 32].to(self.device)
            rebuilt.append(
                self.autoencoder.decode(self.autoencoder.encode(batch).latent_dist.mode()).sample.cpu()
            )
        result = torch.cat(rebuilt).clamp(-1, 1)
        save_grid(torch.cat([pixels[:8], result[:8]]), folder / f"step-{step:08d}.png", columns=8)
        return {"held_out/psnr": psnr(result, pixels)}


def load_images(samples: Sequence[Sample], stop: StopFlag) -> Tensor:
    """Pictures as bytes `n 3 h w`, all at the first one's size."""
    bucket = Bucket(samples[0].width, samples[0].height)
    images = torch.empty(len(samples), 3, bucket.height, bucket.width, dtype=torch.uint8)
    for number, sample in enumerate(tqdm(samples, desc="read images", unit="image", leave=False)):
        stop.check()
        images[number] = load_image(sample.path, bucket).add(1).mul(127.5).round().to(torch.uint8)
    return images


def to_pixels(images: Tensor) -> Tensor:
    """Bytes to floats in [-1, 1]."""
    return images.float().div(127.5).sub(1)


def detailed_crop(image: Tensor, size: int, draw: torch.Generator) -> Tensor:
    """Of three random square crops of `image` (`3 h w`, bytes) the one with the largest variance."""
    rows = torch.randint(image.shape[1] - size + 1, (CROP_CANDIDATES,), generator=draw).tolist()
    columns = torch.randint(image.shape[2] - size + 1, (CROP_CANDIDATES,), generator=draw).tolist()
    crops = [image[:, r : r + size, c : c + size] for r, c in zip(rows, columns, strict=True)]
    return max(crops, key=lambda crop: float(crop[:, ::4, ::4].float().var(dim=(1, 2)).sum()))


def reconstruction_loss(module: AutoencoderKL, pixels: Tensor, noise: Tensor) -> Tensor:
    """Loss of `pixels` (`b 3 h w`, [-1, 1]) decoded from a posterior sample drawn with `noise`."""
    posterior = module.encode(pixels).latent_dist
    mean, log_variance = posterior.mean.float(), posterior.logvar.float()
    latents = mean + torch.exp(0.5 * log_variance) * noise
    rebuilt = module.decode(latents).sample.float()
    divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
    error = MSE_WEIGHT * functional.mse_loss(rebuilt, pixels) + L1_WEIGHT * functional.l1_loss(
        rebuilt, pixels
    )
    total: Tensor = error + KL_WEIGHT * divergence
    return total


def psnr(result: Tensor, reference: Tensor) -> float:
    """Mean over pictures of the peak signal-to-noise ratio in dB, for values in [-1, 1]."""
    error = (result - reference).square().flatten(1).mean(1)
    return float((10 * torch.log10(4 / error.clamp_min(1e-12))).mean()) if len(error) else math.nan


def latent_statistics(objective: AutoencoderObjective, count: int = 1024) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each latent channel over up to `count` training pictures."""
    latents = []
    for first in range(0, min(count, len(objective.images)), 32):
        pixels = to_pixels(objective.images[first : first + 32]).to(objective.device)
        latents.append(objective.autoencoder.encode(pixels).latent_dist.mode().float())
    values = torch.cat(latents)
    return values.mean((0, 2, 3)).tolist(), values.std((0, 2, 3)).tolist()


def preview_facts(objective: AutoencoderObjective, spec: LatentSpec, count: int = 128) -> dict[str, str]:
    """Metadata with the linear map from latents to colours that live previews use."""
    images = to_pixels(objective.images[:count]).to(objective.device)
    latents = spec.to_model(objective.autoencoder.encode(images).latent_dist.mode().float())
    factors, bias = fit_rgb_factors(latents, images)
    return {"flowcore.latent_rgb_factors": json.dumps(factors), "flowcore.latent_rgb_bias": json.dumps(bias)}
