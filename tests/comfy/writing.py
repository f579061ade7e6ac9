"""Make the files of bundled workflows from their descriptions: the UI form, and the picture as thumbnail."""

import io
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from .browser_process import run_browser
from .server import Server
from .workflows import FOLDER, Workflow

THUMBNAIL = (512, 512)


def write_workflows(server: Server, browser_python: Path, workflows: Sequence[Workflow]) -> list[Path]:
    """Write workflow files and thumbnails, and return them.

    Raises: ServerError if a workflow does not run; BrowserError if the page does not build it.
    """
    pictures = {workflow.name: _picture(server, workflow) for workflow in workflows}
    with tempfile.TemporaryDirectory() as folder:
        descriptions = Path(folder) / "descriptions.json"
        descriptions.write_text(json.dumps([workflow.to_dict() for workflow in workflows]), encoding="utf-8")
        run_browser(browser_python, "build", server.url, descriptions, FOLDER)
    for workflow in workflows:
        pictures[workflow.name].save(workflow.thumbnail, quality=90)
    return [path for workflow in workflows for path in (workflow.path, workflow.thumbnail)]


def _picture(server: Server, workflow: Workflow) -> Image.Image:
    """Return the picture that a workflow saves in the size of a thumbnail."""
    outputs = server.run(workflow.prompt)["outputs"]
    (number,) = (number for number, node in workflow.nodes.items() if node.kind == "SaveImage")
    (first,) = server.images({"outputs": {number: outputs[number]}})
    return Image.open(io.BytesIO(first)).convert("RGB").resize(THUMBNAIL, Image.Resampling.LANCZOS)
