"""The shift of published models, and what a file states in its place."""

import math

import pytest

from flowcore.errors import CheckpointError
from flowcore.models import ARCHITECTURES, find_architecture
from flowcore.shifts import default_shift, stated_shift

FLUX = find_architecture("flux").presets


@pytest.mark.parametrize(
    ("architecture", "config", "side", "expected"),
    [
        ("tinyflux", None, 512, 1 / 3),
        ("flux", FLUX["flux-dev"], 1024, math.exp(1.15)),
        ("flux", FLUX["flux-dev"], 256, math.exp(0.5)),
        ("flux", FLUX["flux-schnell"], 1024, 1.0),
        ("single_stream", None, 512, 1.0),
        ("xut", None, 512, 1.0),
        ("exo", None, 1024, 3.0),
    ],
)
def test_published_shifts(architecture: str, config: object, side: int, expected: float) -> None:
    assert default_shift(architecture, config, side // 8, side // 8) == pytest.approx(expected)


def test_every_architecture_has_a_shift() -> None:
    for row in ARCHITECTURES:
        assert all(default_shift(row.name, preset) > 0 for preset in row.presets.values())


def test_what_a_file_states() -> None:
    assert stated_shift({}, "a") is None
    assert stated_shift({"flowcore.shift": "2.5"}, "a") == 2.5
    for text in ("0", "-1", "nan", "much"):
        with pytest.raises(
            CheckpointError, match=f"flowcore.shift in a must be a positive number, got '{text}'"
        ):
            stated_shift({"flowcore.shift": text}, "a")
