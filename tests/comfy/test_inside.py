"""The checks of `inside/` in one ComfyUI process, and what the extension adds to ComfyUI's start."""

import json
import re
import subprocess
from pathlib import Path

import pytest

from tests.comfy.server import environment, link_extension

pytestmark = pytest.mark.comfy
INSIDE = Path(__file__).with_name("inside")
START_LIMIT = 0.15
NAMES = [
    name
    for file in (
        "gpu_checks.py",
        "architecture_checks.py",
        "flux_checks.py",
        "sequence_checks.py",
        "text_checks.py",
        "vae_checks.py",
        "checks.py",
    )
    for name in re.findall(
        r"^def (\w+)\(context: Context\) -> None", (INSIDE / file).read_text("utf-8"), re.MULTILINE
    )
]


def run_inside(
    comfyui: Path, python: Path, base: Path, *flags: str, before: tuple[str, ...] = ()
) -> tuple[dict, str]:
    link = link_extension(base)
    command = [str(python), *before, str(INSIDE), str(comfyui), str(base), "--link", str(link), *flags]
    result = subprocess.run(
        command, cwd=comfyui, env=environment(), capture_output=True, text=True, timeout=1200, check=False
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return json.loads(result.stdout.splitlines()[-1]), result.stderr


@pytest.fixture(scope="module")
def results(comfyui: Path, comfyui_python: Path, base: Path) -> dict[str, str | None]:
    return run_inside(comfyui, comfyui_python, base)[0]


@pytest.mark.parametrize("name", NAMES)
def test_inside(results: dict[str, str | None], name: str) -> None:
    assert results[name] is None, results[name]


def test_the_extension_costs_little_at_start(comfyui: Path, comfyui_python: Path, base: Path) -> None:
    seconds = []
    for _ in range(4):  # other work on the machine lengthens single tries
        found, log = run_inside(comfyui, comfyui_python, base, "--only-import", before=("-X", "importtime"))
        part = log.split("-- extension starts here --")[1].split("-- extension ends here --")[0]
        imported = sum(int(microseconds) for microseconds in re.findall(r"import time:\s+(\d+) \|", part))
        seconds.append(imported / 1e6)
        heavy = [
            name
            for name in found["modules"]
            if name.split(".")[0] in ("transformers", "diffusers", "peft", "pydantic")
        ]
        assert not heavy, heavy[:5]
        if seconds[-1] < START_LIMIT:
            return
    pytest.fail(f"importing the extension took {min(seconds):.3f} s at best, more than {START_LIMIT} s")
