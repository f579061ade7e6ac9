"""The bundled workflow in ComfyUI's real page: listed, dropped on it, queued, finished, without any alert."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from flowcore.assets import list_builtin
from tests.comfy.browser_names import BROWSERS
from tests.comfy.convert import to_api
from tests.comfy.server import LINK_NAME, Server
from tests.comfy.standins import MODEL, TEXT, VAE

pytestmark = [pytest.mark.comfy, pytest.mark.browser]
ROOT = Path(__file__).resolve().parents[2]
WORKFLOW = ROOT / "workflows" / "xut_text_to_image.json"
BUNDLED = {
    "xut-demo": ("diffusion_models", MODEL),
    "scenes-text": ("text_encoders", TEXT),
    "scenes-vae": ("vae", VAE),
}


@pytest.fixture
def playwright_python(comfyui_python: Path) -> Path:
    if not any(shutil.which(name) for name in BROWSERS):
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is on the PATH")
    for python in (Path(sys.executable), comfyui_python):
        if (
            subprocess.run(
                [str(python), "-c", "import playwright"], capture_output=True, check=False
            ).returncode
            == 0
        ):
            return python
    pytest.skip("no interpreter has Playwright: pip install playwright")


@pytest.fixture
def bundled_names(base: Path) -> Iterator[None]:
    """Stand-ins under the bundled names, where this checkout lacks one of the bundled weights."""
    written = []
    if not set(BUNDLED) <= set(list_builtin()):
        for name, (folder, file) in BUNDLED.items():
            target = base / "models" / folder / f"flowcore-{name}.safetensors"
            shutil.copy(base / "models" / folder / file, target)
            written.append(target)
    yield
    for target in written:
        target.unlink()


@pytest.mark.usefixtures("bundled_names")
def test_the_workflow_runs_when_dropped_on_the_page(
    server: Server, playwright_python: Path, tmp_path: Path
) -> None:
    screenshot = Path(os.environ.get("FLOWCORE_SCREENSHOT", tmp_path / "page.png"))
    script = Path(__file__).with_name("browser.py")
    command = [str(playwright_python), str(script), "drop", server.url, str(WORKFLOW), str(screenshot)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    page: dict[str, Any] = json.loads(result.stdout)
    assert WORKFLOW.stem in page["templates"][LINK_NAME]
    for state in (page["loaded"], page["finished"]):
        assert not state["missing"]
        assert not state["alerts"]
        assert not state["dialogs"]
    expected = json.loads(WORKFLOW.read_text(encoding="utf-8"))["nodes"]
    assert sorted(page["loaded"]["nodes"]) == sorted(node["type"] for node in expected)
    assert "SaveImage" in page["finished"]["images"]
    with Image.open(screenshot) as shot:
        assert len(shot.convert("RGB").getcolors(1 << 24) or []) > 200


def test_the_workflow_is_the_api_prompt(server: Server) -> None:
    """Both forms hold the same nodes, links and values; the note is the one beside the prompt."""
    workflow = json.loads(WORKFLOW.read_text(encoding="utf-8"))
    api = ROOT / "tests" / "comfy" / "api" / WORKFLOW.name
    assert to_api(workflow, server.get("/object_info")) == json.loads(api.read_text(encoding="utf-8"))
    notes = [node["widgets_values"] for node in workflow["nodes"] if node["type"] == "MarkdownNote"]
    assert notes == [[api.with_suffix(".md").read_text(encoding="utf-8")]]
