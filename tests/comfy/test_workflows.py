"""The bundled workflows are as their descriptions say, in step with the nodes, listed, and finish when run.

`python -m tests.comfy write` makes their files anew.
"""

import contextlib
import io
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tests.comfy.browser_process import find_browser_python, run_browser
from tests.comfy.convert import to_api
from tests.comfy.install import NotAvailableError
from tests.comfy.server import LINK_NAME, Server, ServerError
from tests.comfy.standins import MODEL, SEQUENCES, SMALL, TEXT, VAE, file_of
from tests.comfy.test_server import node
from tests.comfy.workflows import CURVES_FILE, FACTS, FOLDER, Workflow, bundled, text_to_image
from tests.comfy.writing import THUMBNAIL

pytestmark = pytest.mark.comfy
STANDINS = {
    "flowcore-xut-demo.safetensors": ("diffusion_models", MODEL),
    **{f"flowcore-{name}-demo.safetensors": ("diffusion_models", file_of(name)) for name in SMALL},
    "flowcore-scenes-text.safetensors": ("text_encoders", TEXT),
    "flowcore-scenes-vae.safetensors": ("vae", VAE),
}
"""What may stand in for bundled weights, before which a file of the same name goes."""
WORKFLOWS = bundled()


@pytest.fixture(params=sorted(WORKFLOWS))
def workflow(request: pytest.FixtureRequest) -> Workflow:
    return WORKFLOWS[request.param]


def test_every_file_is_described_and_every_description_has_its_files() -> None:
    names = sorted(path.name for path in FOLDER.iterdir())
    expected = sorted(path.name for w in WORKFLOWS.values() for path in (w.path, w.thumbnail))
    assert names == expected, "run python -m tests.comfy write"
    assert set(FACTS) == {"xut", *SMALL}


def test_files_are_as_described(server: Server, workflow: Workflow) -> None:
    """Nodes, links, values and titles; the note."""
    page = json.loads(workflow.path.read_text(encoding="utf-8"))
    assert to_api(page, server.get("/object_info")) == workflow.prompt, "run python -m tests.comfy write"
    notes = [node["widgets_values"] for node in page["nodes"] if node["type"] == "MarkdownNote"]
    assert notes == [[workflow.note]]
    titles = {str(entry["id"]): entry.get("title") for entry in page["nodes"]}
    for number, placed in workflow.nodes.items():
        assert titles[number] == (placed.title or None)


def test_nodes_have_the_inputs_and_outputs_of_their_schemas(server: Server, workflow: Workflow) -> None:
    described = server.get("/object_info")
    for placed in json.loads(workflow.path.read_text(encoding="utf-8"))["nodes"]:
        kind = placed["type"]
        if kind.startswith("FlowCore"):
            inputs = described[kind]["input"]
            names = [*inputs.get("required", {}), *inputs.get("optional", {})]
            assert sorted(entry["name"] for entry in placed["inputs"]) == sorted(names), kind
            assert [entry["name"] for entry in placed["outputs"]] == described[kind]["output_name"], kind


def test_templates_are_listed_and_served(server: Server, workflow: Workflow) -> None:
    templates = server.get("/api/workflow_templates")
    (names,) = (value for key, value in templates.items() if LINK_NAME in key)
    assert workflow.name in names
    served = server.get(f"/api/workflow_templates/{LINK_NAME}/{workflow.path.name}")
    assert served == json.loads(workflow.path.read_text(encoding="utf-8"))
    thumbnail = server.get_bytes(f"/api/workflow_templates/{LINK_NAME}/{workflow.thumbnail.name}")
    assert Image.open(io.BytesIO(thumbnail)).size == THUMBNAIL


@contextlib.contextmanager
def copies(base: Path, standins: dict[str, tuple[str, str]]) -> Iterator[None]:
    """Stand-ins under other names."""
    written = []
    for name, (folder, file) in standins.items():
        target = base / "models" / folder / name
        shutil.copy(base / "models" / folder / file, target)
        written.append(target)
    yield
    for target in written:
        target.unlink()


@pytest.fixture
def curves_file(base: Path) -> Iterator[None]:
    """A model in the place of the one that the user trains."""
    with copies(base, {CURVES_FILE: ("diffusion_models", SEQUENCES)}):
        yield


@pytest.fixture
def standin_names(base: Path) -> Iterator[None]:
    """Models that stand in for all bundled ones."""
    with copies(base, STANDINS):
        yield


@pytest.fixture
def browser_python(comfyui_python: Path) -> Path:
    try:
        return find_browser_python(comfyui_python)
    except NotAvailableError as error:
        pytest.skip(str(error))


@pytest.mark.browser
@pytest.mark.usefixtures("curves_file")
def test_workflows_finish_when_dropped_on_the_page(
    server: Server, browser_python: Path, tmp_path: Path
) -> None:
    screenshot = Path(os.environ.get("FLOWCORE_SCREENSHOT", tmp_path / "page.png"))
    paths = [workflow.path for workflow in WORKFLOWS.values()]
    pages: dict[str, Any] = run_browser(browser_python, "drop", server.url, screenshot, *paths)
    for name, workflow in WORKFLOWS.items():
        for state in pages[name].values():
            assert not state["missing"], name
            assert not state["alerts"], name
            assert not state["dialogs"], name
        kinds = [node.kind for node in workflow.nodes.values()]
        assert sorted(pages[name]["loaded"]["nodes"]) == sorted([*kinds, "MarkdownNote"])
        assert pages[name]["finished"]["images"], name
    with Image.open(screenshot) as shot:
        assert len(shot.convert("RGB").getcolors(1 << 24) or []) > 200


@pytest.mark.usefixtures("standin_names")
@pytest.mark.parametrize("architecture", sorted(SMALL))
def test_the_workflow_of_every_architecture_runs(server: Server, architecture: str) -> None:
    """Also that of one whose demo model is not bundled."""
    prompt = text_to_image(architecture).prompt
    prompt["7"]["inputs"]["steps"] = 3
    (picture,) = server.images(server.run(prompt))
    assert Image.open(io.BytesIO(picture)).size == (128, 128)


@pytest.mark.usefixtures("curves_file")
def test_sequences_are_sampled_and_drawn(server: Server) -> None:
    """The points of the result are those that plain Python decodes; both pictures come out."""
    from flowcore.flux import load_transport, samples_from_text

    prompt = WORKFLOWS["flux_sequences"].prompt
    prompt["5"]["inputs"]["steps"] = 3
    prompt["20"] = node("SaveLatent", samples=["5", 0], filename_prefix="latents/sequence")
    entry = server.run(prompt)
    assert len(server.images(entry)) == 2
    file = entry["outputs"]["20"]["latents"][0]
    latent = load_file(server.base / "output" / file["subfolder"] / file["filename"])["latent_tensor"]
    assert latent.shape == (1, 2, 24)
    (text,) = entry["outputs"]["9"]["text"]
    spaces = load_transport(server.base / "models" / "diffusion_models" / CURVES_FILE).spaces
    points = samples_from_text(text, spaces.data.codec)
    torch.testing.assert_close(points, spaces.data.decode(latent.mT), rtol=0, atol=1e-5)


def test_a_missing_sequence_model_says_how_to_get_one(server: Server) -> None:
    with pytest.raises(ServerError, match=r"train it .* 'python -m training.sequences curves' and copy"):
        server.run(WORKFLOWS["flux_sequences"].prompt)
