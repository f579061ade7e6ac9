"""The two encoders of a run, images to latents and captions to states: bundled, from files, or built in."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from flowcore.assets import resolve
from flowcore.conditioning import Conditioning, TextShape
from flowcore.errors import ConfigError
from flowcore.vae.latent_spec import LatentSpec
from flowcore.weights.checkpoint import read_tensors
from training.files import sha256
from training.keys import generator


class ImageEncoder(Protocol):
    """Pixels to model-space latents and back."""

    @property
    def identity(self) -> str:
        """What a cache knows the encoder by."""

    @property
    def channels(self) -> int:
        """Channels of the latents."""

    @property
    def downscale(self) -> int:
        """Pixels of an image on a side of a latent cell."""

    @property
    def facts(self) -> Mapping[str, str]:
        """Metadata of the latent space, for the files of models trained on it."""

    def encode(self, images: Tensor) -> Tensor:
        """Latents `b c h w` of images `b 3 y x` in [-1, 1]."""

    def decode(self, latents: Tensor) -> Tensor:
        """Images `b 3 y x` in [-1, 1] of latents `b c h w`."""


class CaptionEncoder(Protocol):
    """Captions to conditioning."""

    @property
    def identity(self) -> str:
        """What a cache knows the encoder by."""

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Context `b m d`, its mask if padding does not count, the pooled vector `b k` if there is one."""


@dataclass(frozen=True, slots=True)
class PixelEncoder:
    """Average-pooled pixels, repeated to the latent channels: needs no weights."""

    channels: int
    identity: str = "pixels-8"
    downscale: int = 8
    facts: Mapping[str, str] = field(default_factory=dict)

    def encode(self, images: Tensor) -> Tensor:
        """Latents `b c h w` at an eighth of the size."""
        pooled = functional.avg_pool2d(images, 8)
        return pooled.repeat(1, -(-self.channels // 3), 1, 1)[:, : self.channels]

    def decode(self, latents: Tensor) -> Tensor:
        """Images of the first three channels."""
        shown = latents.repeat(1, 3, 1, 1)[:, :3] if self.channels < 3 else latents[:, :3]
        return functional.interpolate(shown, scale_factor=8.0, mode="nearest").clamp(-1, 1)


class ByteEncoder:
    """A fixed random vector a byte: needs no weights."""

    def __init__(self, width: int, length: int) -> None:
        """Vectors of `width`; captions are cut or padded to `length` bytes."""
        self.length = length
        self.identity = f"bytes-mean-{width}-{length}"
        self._table = torch.randn(257, width, generator=generator(0, "bytes"))

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """One token a byte; an empty caption is one token of its own."""
        rows = [list(prompt.encode())[: self.length] or [256] for prompt in prompts]
        ids = torch.tensor([row + [256] * (self.length - len(row)) for row in rows])
        mask = torch.arange(self.length) < torch.tensor([len(row) for row in rows])[:, None]
        context = self._table[ids] * mask[..., None]
        pooled = context.sum(1) / mask.sum(1, keepdim=True)
        return Conditioning(context=context, context_mask=mask, pooled=pooled)


class FileImageEncoder:
    """An autoencoder from a file, a folder or a bundled name."""

    def __init__(self, name: str, spec: str, device: torch.device) -> None:
        """`spec` names the latent space of a file that states none.

        Raises: CheckpointError if the file cannot be used.
        """
        from flowcore.vae.autoencoder import load_vae

        self.autoencoder = load_vae(name, spec=spec, device=device, dtype=torch.float32)
        self.channels, self.downscale = self.autoencoder.spec.channels, self.autoencoder.spec.downscale
        self.identity = file_identity(name)
        self.facts = latent_facts(self.autoencoder.spec, name)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Latents in model space, the posterior's mode."""
        return self.autoencoder.encode(images)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Images in [-1, 1]."""
        return self.autoencoder.decode(latents)


class FileCaptionEncoder:
    """A text encoder, or two, from files, folders or bundled names."""

    def __init__(self, names: Sequence[str], text: TextShape, device: torch.device) -> None:
        """Raises: CheckpointError, ConfigError if a file cannot be used, or not for the model."""
        from flowcore.text.loading import load_text_encoder

        self.encoder = load_text_encoder(names, shape=text, device=device)
        self.identity = self.encoder.identity
        self.length = text.length

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """States of the tokens, and what goes with them."""
        return self.encoder.encode(prompts).cut(self.length)


def image_encoder(name: str | None, channels: int, spec: str, device: torch.device) -> ImageEncoder:
    """Encoder named by `encoders.vae`; `pixels` if the name is left out.

    `spec` names the latent space of a file that states none.
    Raises: ConfigError if its channels are not the model's.
    """
    made: ImageEncoder = (
        PixelEncoder(channels) if name in (None, "pixels") else FileImageEncoder(str(name), spec, device)
    )
    if made.channels != channels:
        raise ConfigError(
            f"encoders.vae: {name} must have the model's {channels} channels, got {made.channels}"
        )
    return made


def caption_encoder(names: Sequence[str], text: TextShape, device: torch.device) -> CaptionEncoder:
    """Encoder named by `encoders.text`; `bytes` if there is no name.

    Raises: ConfigError if it does not give what the model reads of a text.
    """
    if text.width is None:
        raise ConfigError("model.preset must be of a model that reads text, got one that reads none")
    if list(names) in ([], ["bytes"]):
        if text.pooled not in (None, text.width):
            raise ConfigError(
                "encoders.text must name an encoder with a pooled vector of the model's width "
                f"{text.pooled}, got bytes, which gives {text.width}"
            )
        return ByteEncoder(text.width, text.length)
    try:
        return FileCaptionEncoder(names, text, device)
    except ConfigError as err:
        raise ConfigError(f"encoders.text: {err}") from err


def latent_facts(spec: LatentSpec, name: str) -> dict[str, str]:
    """Metadata of a latent space, with the linear preview that the autoencoder's file holds."""
    path = resolve(name)
    stored = read_tensors(path)[1] if path.is_file() else {}
    return {
        "flowcore.latent_spec": spec.name,
        "flowcore.latents_mean": json.dumps(list(spec.mean)),
        "flowcore.latents_std": json.dumps(list(spec.std)),
        **{key: value for key, value in stored.items() if key.startswith("flowcore.latent_rgb_")},
    }


def file_identity(name: str) -> str:
    """Hash of the weights in a file, a folder or under a bundled name."""
    path = resolve(name)
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    return "-".join(sha256(file)[:16] for file in files)
