"""From one sequence to another: a trained Flux carries samples of one space into another."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor

from ..conditioning import Conditioning
from ..errors import ConfigError
from ..flow import SOLVERS, StepCallback, VelocityFn, generator_noise, guided, sigma_grid
from ..models.flux import Flux, velocity
from ..weights.checkpoint import load_model
from .space import SpacePair


@dataclass(frozen=True, slots=True, kw_only=True)
class TransportModel:
    """A Flux and the spaces that it was trained between."""

    model: Flux
    spaces: SpacePair


def load_transport(path: str | Path, *, device: torch.device | str = "cpu") -> TransportModel:
    """Return the model of a file that `python -m training.sequences` has written.

    Raises: CheckpointError if the file holds another model, or states no spaces.
    """
    loaded = load_model(path, device=device)
    if not isinstance(loaded.model, Flux):
        raise ConfigError(f"{path} must hold a flux model, got {loaded.architecture.name}")
    return TransportModel(model=loaded.model, spaces=SpacePair.from_metadata(loaded.metadata))


@torch.no_grad()
def transport(
    model: Flux,
    condition: Tensor,
    *,
    space: SpacePair,
    source: Tensor | None = None,
    steps: int = 20,
    solver: str = "euler",
    shift: float = 1.0,
    cfg_scale: float = 1.0,
    seed: int = 0,
    callback: StepCallback | None = None,
) -> Tensor:
    """Return samples of the data space for conditions, one for each.

    Args:
        model: trained between the two spaces.
        condition: samples `b ...` of the condition space.
        space: both spaces.
        source: samples `b ...` of the data space to start from, for a model trained on pairs of them; None
            starts from noise.
        steps: of the solver. More than about 20 change little.
        solver: a name of `flowcore.flow.SOLVERS`.
        shift: of the noise levels, above 1 for more steps in the noise, as for large pictures.
        cfg_scale: guidance away from an empty condition (zero tokens); 1 asks the model once a step.
        seed: of the noise.
        callback: receives the state of every step.

    Raises: ShapeError if condition or source are not of their spaces; ConfigError for an unknown solver.
    """
    if solver not in SOLVERS:
        raise ConfigError(f"the solver must be one of {', '.join(SOLVERS)}, got {solver!r}")
    device = model.img_in.weight.device
    count = condition.shape[0]
    given = conditioning_of(space, condition).to(device)
    generator = torch.Generator().manual_seed(seed)
    if source is None:
        shape = (count, *space.data_positions().shape[1:2], space.data.codec.channels)
        start = torch.randn(shape, generator=generator)
    else:
        start = space.encode_data(source).tokens
    predict = velocity_fn(model, given, cfg_scale)
    latents = rearrange(start, "b n c -> b c n").to(device)
    made = SOLVERS[solver](
        predict, latents, sigma_grid(steps, shift), callback=callback, noise=generator_noise(generator)
    )
    return space.data.decode(rearrange(made, "b c n -> b n c"))


def conditioning_of(space: SpacePair, condition: Tensor, *, is_dropped: Tensor | None = None) -> Conditioning:
    """Return what the network is told for conditions `b ...`: tokens, and the positions of everything.

    is_dropped: `b 1 1` boolean, True = an empty condition: zero tokens.
    """
    tokens, ids = space.encode_condition(condition)
    if is_dropped is not None:
        tokens = tokens.masked_fill(is_dropped, 0.0)
    return Conditioning(context=tokens, extras={"txt_ids": ids, "img_ids": space.data_positions()})


def velocity_fn(model: Flux, conditioning: Conditioning, cfg_scale: float = 1.0) -> VelocityFn:
    """Return the velocity of sequences `b c n` under a condition, guided away from zero tokens."""
    assert conditioning.context is not None  # as `conditioning_of` makes it
    empty = replace(conditioning, context=torch.zeros_like(conditioning.context))

    def under(condition: Conditioning) -> VelocityFn:
        return lambda x, sigma: velocity(model.forward, x, sigma, condition)

    return guided(under(conditioning), under(empty), cfg_scale)
