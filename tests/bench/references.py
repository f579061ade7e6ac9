"""The originals that `--reference` knows. Standard library only: their adapters are in `originals`."""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass

from tests.bench.cases import BACKWARD, CHECKPOINTED, FORWARD, LOAD, SAMPLE, TRAIN


@dataclass(frozen=True, kw_only=True)
class Reference:
    """An original implementation of one architecture.

    adapter: a function of `originals`. python: the interpreter that it needs. rows: what it can do.
    """

    arch: str
    adapter: str
    python: Callable[[], str] = lambda: sys.executable
    rows: tuple[str, ...] = (LOAD, FORWARD, BACKWARD, TRAIN, CHECKPOINTED, SAMPLE)


REFERENCES: dict[str, Reference] = {
    "xut": Reference(arch="xut", adapter="hdm"),
    "flux": Reference(arch="flux", adapter="seed_flux"),
    "bfl": Reference(arch="flux", adapter="bfl"),
    "diffusers": Reference(arch="flux", adapter="diffusers"),
    "comfyui": Reference(
        arch="flux",
        adapter="comfyui",
        python=lambda: os.environ.get("COMFYUI_PYTHON", sys.executable),
        rows=(LOAD, FORWARD, SAMPLE),  # its blocks write over what a backward pass needs
    ),
    "tinyflux": Reference(arch="tinyflux", adapter="tiny_flux"),
    "single_stream": Reference(arch="single_stream", adapter="single_stream"),
}
"""By the NAME of `--reference NAME=DIR`; a new one is one line here and its adapter."""
