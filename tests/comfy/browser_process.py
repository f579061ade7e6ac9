"""Run `browser.py` in an interpreter that has Playwright. Standard library only."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from .browser_names import BROWSERS
from .install import NotAvailableError

SECONDS = 900


class BrowserError(Exception):
    """The page did not do what was asked."""


def find_browser_python(comfyui_python: Path) -> Path:
    """Return an interpreter that can drive a browser.

    Raises: NotAvailableError if there is no browser, or none has Playwright.
    """
    if not any(shutil.which(name) for name in BROWSERS):
        raise NotAvailableError(f"no browser: none of {', '.join(BROWSERS)} is on the PATH")
    for python in (Path(sys.executable), comfyui_python):
        command = [str(python), "-c", "import playwright"]
        if subprocess.run(command, capture_output=True, check=False).returncode == 0:
            return python
    raise NotAvailableError("no interpreter has Playwright: pip install playwright")


def run_browser(python: Path, *arguments: str | Path) -> dict[str, Any]:
    """Return what an action of `browser.py` prints. Raises: BrowserError with the end of its messages."""
    command = [str(python), str(Path(__file__).with_name("browser.py")), *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    if result.returncode != 0:
        raise BrowserError(result.stderr[-3000:])
    return dict(json.loads(result.stdout))
