"""What ComfyUI must know of each architecture besides its row in `ARCHITECTURES`: a row each in `HOSTS`."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import comfy.conds
from comfy.model_base import ModelType
from torch import Tensor

from ...flowcore.shifts import default_shift
from . import flux_conds, sequence_conds, tinyflux_conds, xut_conds
from .model import FlowCoreModel, FluxModel
from .network import (
    FluxNetwork,
    Network,
    SequenceNetwork,
    SingleStreamNetwork,
    TinyFluxNetwork,
    XutNetwork,
)

Conds = dict[str, comfy.conds.CONDRegular]
Sampling = tuple[ModelType, dict[str, float]]
"""A kind of sampling, and its settings as ComfyUI names them."""


def _nothing_packed(conditions: Mapping[str, Any], config: Any) -> Conds:  # noqa: ANN401, ARG001 - as `Host.pack`
    return {}


def _nothing_unpacked(
    x: Tensor,  # noqa: ARG001 - as `Host.unpack`
    timestep: Tensor,  # noqa: ARG001
    extras: Mapping[str, Any],  # noqa: ARG001
    config: Any,  # noqa: ANN401, ARG001
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    return {}, {}


def shifted(shift: float = 1.0) -> Sampling:
    """Return straight paths with a multiplicative shift; below 1 steps are finer near the data."""
    return ModelType.FLOW, {"shift": shift, "multiplier": 1.0}


def _flux_sampling(config: Any) -> Sampling:  # noqa: ANN401 - as `Host.sampling`
    """Return ComfyUI's own kind for FLUX.1 dev, shifted as for 1024 pixels; schnell is not shifted."""
    if not config.guidance_embed:
        return shifted()
    return ModelType.FLUX, {"shift": math.log(default_shift("flux", config))}


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """One architecture in ComfyUI. Functions take its configuration.

    Attributes:
        network: flowcore's model out of ComfyUI's layers.
        model: the adapter around it.
        stock_kinds: the names by which stock nodes know the kinds of blocks.
        cuts_text: prompts end at the most tokens that the model reads, as in plain Python; other models read
            what nodes join to a prompt.
        token_side: latent cells a side of an image token.
        memory: ComfyUI's factor: activations for each latent cell.
        sampling: how levels are laid out where no node says otherwise.
        pack: (one part of the conditioning, configuration) -> the extras in ComfyUI's containers.
        unpack: (latents, sigma, extras of a batch, configuration) -> `Conditioning.extras`, and further
            keyword arguments of `velocity`.
        unet_config: further entries that ComfyUI's own code reads.
    """

    network: type[Network]
    model: type[FlowCoreModel] = FlowCoreModel
    stock_kinds: Mapping[str, str]
    cuts_text: bool = False
    token_side: Callable[[Any], int]
    memory: Callable[[Any], float]
    sampling: Callable[[Any], Sampling] = lambda config: shifted()  # noqa: ARG005
    pack: Callable[[Mapping[str, Any], Any], Conds] = _nothing_packed
    unpack: Callable[..., tuple[dict[str, Tensor], dict[str, Any]]] = _nothing_unpacked
    unet_config: Callable[[Any], Mapping[str, Any]] = lambda config: {}  # noqa: ARG005


HOSTS: Mapping[str, Host] = {
    "xut": Host(
        network=XutNetwork,
        stock_kinds={"enc": "double_block", "dec": "single_block"},
        cuts_text=True,
        token_side=lambda config: config.patch_size,
        memory=lambda config: 2.0 * config.dim / 1024,  # what the published extension declares
        pack=xut_conds.pack,
        unpack=xut_conds.unpack,
    ),
    "flux": Host(
        network=FluxNetwork,
        model=FluxModel,
        stock_kinds={"double": "double_block", "single": "single_block"},
        token_side=lambda config: FluxNetwork.patch_size,  # noqa: ARG005
        memory=lambda config: 3.1 * config.hidden_size / 3072,  # what ComfyUI declares for FLUX.1
        sampling=_flux_sampling,
        pack=flux_conds.pack,
        unpack=flux_conds.unpack,
        unet_config=flux_conds.unet_config,
    ),
    "tinyflux": Host(
        network=TinyFluxNetwork,
        stock_kinds={"double": "double_block", "single": "single_block"},
        token_side=lambda config: config.patch_size,
        memory=lambda config: 2.0 * config.hidden_size / 512,
        sampling=lambda config: shifted(default_shift("tinyflux", config)),
        pack=tinyflux_conds.pack,
        unpack=tinyflux_conds.unpack,
    ),
    "single_stream": Host(
        network=SingleStreamNetwork,
        stock_kinds={"blocks": "single_block"},
        cuts_text=True,
        token_side=lambda config: config.patch_size,
        memory=lambda config: 0.8 * config.hidden_size / 384,
    ),
}

SEQUENCES = Host(
    network=SequenceNetwork,
    stock_kinds=HOSTS["flux"].stock_kinds,
    token_side=lambda config: 1,  # noqa: ARG005 - a token is a column
    memory=HOSTS["flux"].memory,
    pack=sequence_conds.pack,
    unpack=sequence_conds.unpack,
)
"""A Flux between sequences, which ComfyUI's own code for Flux does not know."""
