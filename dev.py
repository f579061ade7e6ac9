#!/usr/bin/env python3
"""Set FlowCore up from a checkout and run it: the demo, the tests, or ComfyUI with the extension linked.

Needs Python 3.10 or newer and the package index, nothing else. On its first run every command makes the
virtual environment `.venv` in the checkout (or in the folder that FLOWCORE_VENV names) and installs what it
needs there; later runs start at once, until the lists of packages change. Progress goes to stderr, results to
stdout.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parent
MIN_PYTHON = (3, 10)
STAMP = "flowcore.json"
COMFYUI_VERSION = "0.3.64"
CHECKS = {
    "ruff": ["ruff", "check", "--output-format", "concise", "."],
    "format": ["ruff", "format", "--check", "--output-format", "concise", "."],
    "mypy": ["mypy"],
    "pytest": ["pytest"],
}
OFFLINE_MARKS = (
    "NameResolutionError",
    "Failed to resolve",
    "NewConnectionError",
    "ConnectTimeoutError",
    "ConnectionError",
    "ConnectionResetError",
    "Network is unreachable",
    "ProxyError",
    "Read timed out",
    "SSLError",
)


class SetupError(Exception):
    """What keeps a command from running; the message is one line for the user."""


# --- the virtual environment ----------------------------------------------------------------------


def environment_folder() -> Path:
    """Folder of the virtual environment."""
    return Path(os.environ.get("FLOWCORE_VENV") or ROOT / ".venv").expanduser().absolute()


def environment_python(folder: Path) -> Path:
    """Interpreter of the virtual environment in folder."""
    return folder / "Scripts" / "python.exe" if os.name == "nt" else folder / "bin" / "python"


def ensure_environment(folder: Path) -> Path:
    """Interpreter of a usable virtual environment in folder, which is made if there is none.

    Raises: SetupError if folder holds something else, or if this Python cannot make environments.
    """
    python = environment_python(folder)
    if python.is_file() and ((folder / STAMP).is_file() or has_pip(python)):
        return python
    is_free = not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))
    if not is_free and not (folder / "pyvenv.cfg").is_file():
        raise SetupError(
            f"{folder} must be a virtual environment or absent; move it away or set FLOWCORE_VENV"
        )
    report(f"making a virtual environment in {folder}")
    made = subprocess.run(
        [sys.executable, "-m", "venv", "--clear", str(folder)], capture_output=True, text=True, check=False
    )
    if made.returncode != 0:
        reason = last_line(made.stderr) or last_line(made.stdout) or f"exit code {made.returncode}"
        raise SetupError(
            f"{sys.executable} could not make a virtual environment in {folder}: {reason}; "
            "on Debian and Ubuntu install the package python3-venv first"
        )
    return python


def has_pip(python: Path) -> bool:
    """Whether the interpreter starts and has pip."""
    try:
        found = subprocess.run([str(python), "-m", "pip", "--version"], capture_output=True, check=False)
    except OSError:
        return False
    return found.returncode == 0


# --- packages -------------------------------------------------------------------------------------


def install_package(folder: Path, extras: set[str]) -> None:
    """Install this checkout and its extras into the environment, unless that has been done.

    Raises: SetupError if pip fails.
    """
    digest = digest_of(str(ROOT).encode(), (ROOT / "pyproject.toml").read_bytes())
    stamp = read_stamp(folder)
    present = set(stamp.get("extras", [])) if stamp.get("package") == digest else set()
    if present >= extras:
        return
    wanted = sorted(present | extras)
    report(f"installing FlowCore with {', '.join(wanted)} (the first time takes some minutes)")
    pip_install(folder, ["--editable", f".[{','.join(wanted)}]"])
    write_stamp(folder, {**stamp, "package": digest, "extras": wanted})


def install_files(folder: Path, files: list[Path], more: list[str]) -> None:
    """Install requirements files, and packages by name, into the environment, unless that has been done.

    Raises: SetupError if pip fails.
    """
    digest = digest_of(*(file.read_bytes() for file in files))
    stamp = read_stamp(folder)
    if stamp.get("files") == digest:
        return
    report(f"installing {', '.join(str(file) for file in files)} (the first time takes some minutes)")
    pip_install(folder, [argument for file in files for argument in ("--requirement", str(file))] + more)
    write_stamp(folder, {**stamp, "files": digest})


def pip_install(folder: Path, arguments: list[str]) -> None:
    """Run `pip install` in the environment, with its progress on stderr.

    Raises: SetupError with pip's first error, or with the remedy if the package index was out of reach.
    """
    command = [
        str(environment_python(folder)),
        "-m",
        "pip",
        "install",
        "--disable-pip-version-check",
        *arguments,
    ]
    errors: list[str] = []
    with subprocess.Popen(
        command, cwd=ROOT, stdout=sys.stderr, stderr=subprocess.PIPE, text=True, errors="replace"
    ) as process:
        for line in process.stderr or ():
            sys.stderr.write(line)
            errors.append(line)
    if process.returncode == 0:
        return
    if any(mark in line for line in errors for mark in OFFLINE_MARKS):
        raise SetupError(
            "the package index could not be reached; connect to the network, or set PIP_PROXY or "
            "PIP_INDEX_URL, and run the same command again"
        )
    reasons = [line.removeprefix("ERROR:").strip() for line in errors if line.startswith("ERROR:")]
    reason = reasons[0] if reasons else f"exit code {process.returncode}"
    raise SetupError(f"pip could not install the packages: {reason}")


def digest_of(*parts: bytes) -> str:
    """Hash of the parts, and of the file that PIP_CONSTRAINT names, since it decides what pip installs."""
    constraint = Path(os.environ.get("PIP_CONSTRAINT", ""))
    parts += (constraint.read_bytes() if constraint.is_file() else b"",)
    return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()


def read_stamp(folder: Path) -> dict[str, Any]:
    """What earlier runs have installed into the environment; empty if nothing is known."""
    try:
        stamp = json.loads((folder / STAMP).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return stamp if isinstance(stamp, dict) else {}


def write_stamp(folder: Path, stamp: dict[str, Any]) -> None:
    """Remember what is installed in the environment."""
    (folder / STAMP).write_text(json.dumps(stamp, indent=1), encoding="utf-8")


# --- commands -------------------------------------------------------------------------------------


def demo(_options: argparse.Namespace, more: list[str]) -> int:
    """Draw scenes with the bundled demo models and print the judge's table."""
    folder = environment_folder()
    python = ensure_environment(folder)
    install_package(folder, {"train"})
    return run(python, "training.compare", ["--count", "64", "--images", "out/demo", *more])


def test(options: argparse.Namespace, more: list[str]) -> int:
    """Run the checks and the tests; each one runs whether or not an earlier one failed."""
    folder = environment_folder()
    python = ensure_environment(folder)
    install_package(folder, {"dev", "train"})
    failed = []
    for name in options.only or CHECKS:
        module, *arguments = CHECKS[name]
        report(f"{name}: python -m {' '.join([module, *arguments])}")
        if run(python, module, arguments + (more if name == "pytest" else [])) != 0:
            failed.append(name)
    if failed:
        print(f"error: failed: {', '.join(failed)}; the output stands above", file=sys.stderr)
    return 1 if failed else 0


def comfy(options: argparse.Namespace, more: list[str]) -> int:
    """Start ComfyUI with this checkout linked as an extension; fetch and install ComfyUI first if needed."""
    source = comfyui_folder(options.version)
    named = os.environ.get("COMFYUI_PYTHON")
    if named:
        python = Path(named)
    else:
        folder = environment_folder()
        python = ensure_environment(folder)
        # ComfyUI imports requests without listing it.
        install_files(folder, [source / "requirements.txt", ROOT / "requirements.txt"], ["requests"])
    if options.prepare:
        print(python)
        return 0
    return run(python, "tests.comfy", ["run", *more], COMFYUI_DIR=str(source), COMFYUI_PYTHON=str(python))


def comfyui_folder(version: str) -> Path:
    """Folder of a ComfyUI checkout: COMFYUI_DIR, or the cached one of this version, fetched if it is missing.

    Raises: SetupError if there is none and none can be fetched.
    """
    named = os.environ.get("COMFYUI_DIR")
    if named:
        folder = Path(named).expanduser().absolute()
    else:
        report(f"looking for ComfyUI {version}")
        command = [sys.executable, "-m", "tests.comfy", "--version", version]
        found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if found.returncode != 0:
            reason = last_line(found.stderr).removeprefix("error:").strip()
            raise SetupError(f"{reason}; set COMFYUI_DIR to a copy of ComfyUI {version}")
        folder = Path(last_line(found.stdout))
    if not (folder / "main.py").is_file() or not (folder / "requirements.txt").is_file():
        raise SetupError(
            f"{folder} must be a ComfyUI checkout with main.py and requirements.txt; set COMFYUI_DIR"
        )
    return folder


def run(python: Path, module: str, arguments: list[str], **environment: str) -> int:
    """Exit code of `python -m module arguments` in the checkout.

    A Ctrl-C reaches the process from the terminal, a termination through this one: it ends by itself.
    """
    command = [str(python), "-m", module, *arguments]
    sys.stdout.flush()
    with subprocess.Popen(command, cwd=ROOT, env={**os.environ, **environment}) as process:
        signal.signal(signal.SIGTERM, lambda *_: process.terminate())
        while True:
            try:
                code = process.wait()
            except KeyboardInterrupt:
                continue
            return code if code >= 0 else 128 - code


# --- command line ---------------------------------------------------------------------------------


def report(text: str) -> None:
    """Show one line of progress."""
    print(f"dev.py: {text}", file=sys.stderr, flush=True)


def last_line(text: str) -> str:
    """The last line of text that is not blank, or an empty string."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""


class Parser(argparse.ArgumentParser):
    """Parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Print message and leave with exit code 2."""
        self.exit(2, f"error: {message}; {self.prog} --help lists what is allowed\n")


def build_parser() -> argparse.ArgumentParser:
    """The command line: three commands, each with its own help."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="{demo,test,comfy}")

    command = commands.add_parser(
        "demo",
        help="draw 64 images with the bundled model into out/demo and print how many show what was asked for",
        description="Draw scenes with the bundled demo model into out/demo and print the judge's table. "
        "Further arguments go to `python -m training.compare`, such as --count 500.",
    )
    command.set_defaults(action=demo)

    command = commands.add_parser(
        "test",
        help="run ruff, mypy and the tests",
        description="Run ruff, mypy and pytest. Further arguments go to pytest, such as -k solvers.",
    )
    command.add_argument(
        "--only", action="append", choices=list(CHECKS), help="run this check alone (repeatable)"
    )
    command.set_defaults(action=test)

    command = commands.add_parser(
        "comfy",
        help="start ComfyUI with this checkout linked as an extension",
        description="Start ComfyUI with this checkout linked as an extension; the first run fetches it. "
        "COMFYUI_DIR names another copy, COMFYUI_PYTHON an interpreter that has ComfyUI's packages. "
        "Further arguments go to `python -m tests.comfy run`, such as a workflow to run.",
    )
    command.add_argument("--version", default=COMFYUI_VERSION, help="of ComfyUI (default: %(default)s)")
    command.add_argument(
        "--prepare",
        action="store_true",
        help="only fetch and install; print the interpreter for COMFYUI_PYTHON",
    )
    command.set_defaults(action=comfy)
    return parser


def main() -> int:
    """Run the command line; 0 done, 1 failed, 2 set-up or arguments unusable."""
    if sys.version_info < MIN_PYTHON:
        need = ".".join(map(str, MIN_PYTHON))
        have = ".".join(map(str, sys.version_info[:3]))
        print(f"error: Python must be {need} or newer, got {have} ({sys.executable})", file=sys.stderr)
        return 2
    options, more = build_parser().parse_known_args()
    try:
        return int(options.action(options, more))
    except SetupError as err:
        print(f"error: {err}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("error: stopped", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
