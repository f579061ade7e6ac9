"""What holds for every test: no network, fixed seeds, versions in the header, GPU tests only on a GPU."""

import importlib.metadata
import os
import platform

import numpy as np
import pytest
import torch

# Before any test imports these libraries: a test that would fetch something fails instead.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
# Plots are drawn to files on machines without a screen.
os.environ["MPLBACKEND"] = "Agg"

REPORTED = ("torch", "transformers", "diffusers", "tokenizers", "safetensors", "einops", "numpy", "pydantic")


def pytest_report_header() -> list[str]:
    """Versions on which the numbers of a run depend."""
    versions = []
    for name in REPORTED:
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"{name} absent")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return [
        f"versions: {', '.join(versions)}",
        f"machine: {platform.platform()}, {torch.get_num_threads()} threads, GPU: {device}",
    ]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip GPU tests on machines without a GPU."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _seeds() -> None:
    """Start every test from the same random state, so that its outcome does not depend on its neighbours."""
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002 - libraries under test may draw from the old global generator
