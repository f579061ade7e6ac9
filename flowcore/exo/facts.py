"""What an Exo file says in its metadata: the autoencoder of its latents, and how it was trained."""

import json
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ..errors import CheckpointError
from ..vae.latent_spec import LATENT_SPECS

VAE, TRAINING = "exo.vae", "exo.training"
FAMILIES = ("flux2", "flux1")
"""Of autoencoders; any other is of the family `tiny`."""
UNSTATED_ITERATIONS = (1, 4)
"""Least and most refinements in training, of a file that does not state them."""


class VaePlace(NamedTuple):
    """Where an autoencoder is: a bundled name, a file, a folder or a repository, and a folder in it."""

    repo: str
    subfolder: str


def describe_vae(space: str, repo: str, subfolder: str = "") -> str:
    """Return the metadata of an autoencoder; space: the name of its latent space."""
    known = LATENT_SPECS.get(space)
    name = known.shares or known.name if known else space
    family = name if name in FAMILIES else "tiny"
    return json.dumps({"family": family, "repo": repo, "subfolder": subfolder})


def stated_vae(metadata: Mapping[str, str], source: str) -> VaePlace | None:
    """Return the autoencoder that a file names, None if it names none. Raises: CheckpointError."""
    stated = metadata.get(VAE)
    if stated is None:
        return None
    try:
        values = json.loads(stated)
        place = VaePlace(str(values["repo"]), str(values.get("subfolder") or ""))
    except (ValueError, KeyError, TypeError, AttributeError):
        place = VaePlace("", "")
    if not place.repo:
        raise CheckpointError(f"{VAE} in {source} must be JSON with a repo, got {stated[:60]!r}")
    return place


def describe_training(*, stage: str, step: int, data: Sequence[str], iterations: tuple[int, int]) -> str:
    """Return the metadata of a training: its last stage, all its steps, data sets, refinements drawn."""
    return json.dumps({"stage": stage, "step": step, "data": list(data), "iterations": list(iterations)})


def trained_iterations(metadata: Mapping[str, str], source: str) -> tuple[int, int]:
    """Return the least and the most refinements in a step of training. Raises: CheckpointError."""
    stated = metadata.get(TRAINING)
    if stated is None:
        return UNSTATED_ITERATIONS
    try:
        least, most = map(int, json.loads(stated).get("iterations", UNSTATED_ITERATIONS))
    except (ValueError, TypeError, AttributeError) as err:
        raise CheckpointError(
            f"{TRAINING} in {source} must be JSON with iterations [least, most], got {stated[:60]!r}"
        ) from err
    return least, most
