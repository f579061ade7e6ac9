"""The shift of the noise levels that a model's pictures are sampled with, where the caller states none."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from .errors import CheckpointError
from .flow.schedule import check_shift, flux1_mu

SHIFT = "flowcore.shift"
"""Metadata of a model file that states its shift."""


def stated_shift(metadata: Mapping[str, str], source: str) -> float | None:
    """Return the shift that a model's file states, or None. Raises: CheckpointError if it is no shift."""
    text = metadata.get(SHIFT)
    if text is None:
        return None
    try:
        shift = float(text)
        check_shift(shift)
    except ValueError as err:
        raise CheckpointError(f"{SHIFT} in {source} must be a positive number, got {text[:40]!r}") from err
    return shift


def default_shift(architecture: str, config: Any, rows: int = 128, columns: int = 128) -> float:  # noqa: ANN401
    """Return the shift of published models, for latents of rows x columns (128 = 1024 pixels)."""
    return _PUBLISHED.get(architecture, _none)(config, rows, columns)


def _flux(config: Any, rows: int, columns: int) -> float:  # noqa: ANN401
    """FLUX.1 dev's shift grows with the picture; schnell, without embedded guidance, has none."""
    tokens = math.ceil(rows / 2) * math.ceil(columns / 2)
    return math.exp(flux1_mu(tokens)) if config.guidance_embed else 1.0


def _none(config: Any, rows: int, columns: int) -> float:  # noqa: ANN401, ARG001 - as the others
    return 1.0


_PUBLISHED: Mapping[str, Callable[[Any, int, int], float]] = {
    "flux": _flux,
    "tinyflux": lambda config, rows, columns: 1 / 3,  # noqa: ARG005 - its own 3, in a time that runs back
    "exo": lambda config, rows, columns: 3.0,  # noqa: ARG005
}
