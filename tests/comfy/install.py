"""Where ComfyUI and an interpreter for it are. Standard library only.

Looked for in this order: `COMFYUI_DIR`; the cache folder; a clone of the pinned tag into the cache folder.
Interpreter: `COMFYUI_PYTHON`; the running one; the virtual environment `comfyui-python` in the cache folder.
"""

import os
import subprocess
import sys
from pathlib import Path

VERSION = "0.3.64"
VERSIONS = ("0.3.64", "0.8.0")
REPOSITORY = "https://github.com/comfyanonymous/ComfyUI"
NEEDED = (
    "torch",
    "torchvision",
    "torchaudio",
    "torchsde",
    "aiohttp",
    "av",
    "comfyui_frontend_package",
    "diffusers",
)
CLONE_TIMEOUT = 600


class NotAvailableError(Exception):
    """ComfyUI or its interpreter is not to be had; the message is the reason that tests print."""


def cache_folder() -> Path:
    """Return the folder that holds ComfyUI checkouts between runs."""
    local = os.environ.get("LOCALAPPDATA")
    return (
        Path(local) / "flowcore" if sys.platform == "win32" and local else Path.home() / ".cache" / "flowcore"
    )


def find_comfyui(version: str = VERSION, *, clone: bool = True) -> Path:
    """Return the folder of a ComfyUI.

    Raises: NotAvailableError if it is not here and cannot be cloned.
    """
    named = os.environ.get("COMFYUI_DIR")
    if named:
        return _checked(Path(named).expanduser(), "COMFYUI_DIR")
    folder = cache_folder() / f"comfyui-{version}"
    if (folder / "main.py").is_file():
        return folder
    if not clone:
        raise NotAvailableError(f"ComfyUI {version} is not in {folder} and COMFYUI_DIR is not set")
    return _clone(version, folder)


def _checked(folder: Path, source: str) -> Path:
    if not (folder / "main.py").is_file():
        raise NotAvailableError(f"{source} must be a ComfyUI folder, got {folder} without main.py")
    return folder


def _clone(version: str, folder: Path) -> Path:
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = folder.with_name(f"{folder.name}.tmp-{os.getpid()}")
    command = ["git", "clone", "--depth", "1", "--branch", f"v{version}", REPOSITORY, str(aside)]
    environment = {**os.environ, "GIT_TERMINAL_PROMPT": "0"}
    try:
        subprocess.run(
            command, check=True, capture_output=True, text=True, timeout=CLONE_TIMEOUT, env=environment
        )
    except (OSError, subprocess.SubprocessError) as error:
        detail = (getattr(error, "stderr", None) or str(error)).strip().splitlines() or ["no message"]
        raise NotAvailableError(f"ComfyUI {version} could not be cloned: {detail[-1]}") from error
    aside.rename(folder)
    return folder


def find_python() -> Path:
    """Return an interpreter that has what ComfyUI and the extension need; `dev.py comfy` makes one.

    Raises: NotAvailableError if there is none.
    """
    named = os.environ.get("COMFYUI_PYTHON")
    own = cache_folder() / "comfyui-python"
    own_python = own / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    reasons = []
    for candidate in [Path(named)] if named else [Path(sys.executable), own_python]:
        lacking = _lacking(candidate)
        if not lacking:
            return candidate
        reasons.append(f"{candidate} lacks {', '.join(lacking)}")
    raise NotAvailableError(f"no interpreter for ComfyUI: {'; '.join(reasons)}; set COMFYUI_PYTHON")


def _lacking(python: Path) -> list[str]:
    """Return the modules that an interpreter does not find; all when there is no interpreter."""
    code = f"import importlib.util as u; print(*[n for n in {NEEDED!r} if u.find_spec(n) is None])"
    try:
        result = subprocess.run(
            [str(python), "-c", code], check=True, capture_output=True, text=True, timeout=60
        )
    except (OSError, subprocess.SubprocessError):
        return list(NEEDED)
    return result.stdout.split()
