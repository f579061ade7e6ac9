"""Conditioning and sampling for the stand-ins."""

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import comfy.sample
import comfy.samplers
import torch
from torch import Tensor

WIDTH = 32
SIZE = (16, 12)


def conditioning(seed: int, num_tokens: int, **entries: Any) -> list[list[Any]]:
    """A prompt's conditioning in ComfyUI's form: random states and their mean."""
    states = torch.randn(1, num_tokens, WIDTH, generator=torch.Generator().manual_seed(seed))
    return [[states, {"pooled_output": states.mean(dim=1), **entries}]]


def sample(model: Any, positive: Any, negative: Any, *, size: tuple[int, int] = SIZE) -> Tensor:
    """Raw latents after four even Euler steps by ComfyUI's own sampler at scale 3."""
    latent = torch.zeros(1, 16, *size)
    noise = comfy.sample.prepare_noise(latent, 0)
    sigmas, sampler = torch.linspace(1, 0, 5), comfy.samplers.sampler_object("euler")
    with torch.inference_mode():
        return comfy.sample.sample_custom(
            model, noise, 3.0, sampler, sigmas, positive, negative, latent, disable_pbar=True, seed=0
        )


@contextlib.contextmanager
def warnings_of_comfyui() -> Iterator[list[str]]:
    """What ComfyUI logs as warning or error meanwhile."""
    found: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: found.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger().addHandler(handler)
    try:
        yield found
    finally:
        logging.getLogger().removeHandler(handler)
