"""One ComfyUI server for all tests; skipped, with the reason, where ComfyUI is not to be had."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.comfy.install import VERSION, NotAvailableError, find_comfyui, find_python
from tests.comfy.server import Server


@pytest.fixture(scope="session")
def comfyui() -> Path:
    try:
        return find_comfyui(os.environ.get("COMFYUI_VERSION", VERSION))
    except NotAvailableError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def comfyui_python(comfyui: Path) -> Path:  # noqa: ARG001 - no interpreter is looked for without ComfyUI
    try:
        return find_python()
    except NotAvailableError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A ComfyUI base folder with the stand-in models."""
    from tests.comfy.standins import write_standins

    folder = tmp_path_factory.mktemp("comfy")
    write_standins(folder / "models")
    yield folder
    shutil.rmtree(
        folder / "custom_nodes", ignore_errors=True
    )  # the link, which rmtree removes without following


@pytest.fixture(scope="session")
def server(comfyui: Path, comfyui_python: Path, base: Path) -> Iterator[Server]:
    arguments = ("--cpu", "--preview-method", "latent2rgb")
    with Server(comfyui, comfyui_python, base=base, arguments=arguments) as running:
        yield running


@pytest.fixture
def prompt() -> dict[str, Any]:
    """The bundled workflow in API form, on the stand-in models; 5 steps."""
    from tests.comfy.standins import MODEL, TEXT, VAE
    from tests.comfy.workflows import text_to_image

    nodes = text_to_image("xut").prompt
    nodes["1"]["inputs"]["model_name"] = MODEL
    nodes["2"]["inputs"]["clip_name"] = TEXT
    nodes["3"]["inputs"]["vae_name"] = VAE
    nodes["7"]["inputs"]["steps"] = 5
    return nodes
