"""`python -m tests.comfy --version V` prepares ComfyUI; `... run [WORKFLOW.json]` starts it.

The extension is linked into the server's custom_nodes. A workflow is run, its pictures are written into
the current folder, and the server ends; without one the server runs until Ctrl-C. `... write [NAME...]` makes
the bundled workflows and their thumbnails from their descriptions in `tests/comfy/workflows.py`.
"""

import argparse
import json
import sys
import time
from pathlib import Path

from .browser_process import BrowserError, find_browser_python
from .convert import ConversionError, is_api, to_api
from .install import VERSION, NotAvailableError, find_comfyui, find_python
from .server import Server, ServerError


def main() -> int:
    """Return the exit code: 0, 1 for a failed run, 2 for arguments that cannot be used."""
    options = _parser().parse_args()
    try:
        comfyui = find_comfyui(options.version)
        if options.command is None:
            print(comfyui)
            return 0
        return _run(options, comfyui) if options.command == "run" else _write(options, comfyui)
    except (NotAvailableError, ServerError, BrowserError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.comfy", description="ComfyUI with this extension linked."
    )
    parser.add_argument(
        "--version", default=VERSION, help="tag of ComfyUI that is looked for or cloned (%(default)s)"
    )
    commands = parser.add_subparsers(dest="command")
    run = commands.add_parser("run", help="start a server, and run a workflow if one is given")
    run.add_argument(
        "workflow",
        nargs="?",
        type=Path,
        help="workflow to run, in UI or API form; without it the server stays",
    )
    run.add_argument("--port", type=int, default=8188, help="port of a server that stays (%(default)s)")
    run.add_argument("--cpu", action="store_true", help="use no accelerator even if there is one")
    write = commands.add_parser("write", help="make the files in workflows/ anew; needs a browser")
    write.add_argument("names", nargs="*", metavar="NAME", help="workflows (default: all on bundled weights)")
    for command in (run, write):
        command.add_argument(
            "--base", type=Path, help="folder for models, input, output and user (default: a temporary one)"
        )
    return parser


def _run(options: argparse.Namespace, comfyui: Path) -> int:
    workflow = None
    if options.workflow is not None:
        try:
            workflow = json.loads(options.workflow.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            print(f"error: {options.workflow} must be a workflow in JSON, got {error}", file=sys.stderr)
            return 2
    python = find_python()
    arguments = ("--cpu",) if options.cpu or not _has_accelerator(python) else ()
    port = options.port if workflow is None else None
    base = None if options.base is None else options.base.resolve()
    with Server(comfyui, python, base=base, arguments=arguments, port=port) as server:
        print(f"ComfyUI is at {server.url}, its folders in {server.base}", file=sys.stderr)
        if workflow is None:
            return _stay(server)
        try:
            prompt = workflow if is_api(workflow) else to_api(workflow, server.get("/object_info"))
        except ConversionError as error:
            print(
                f"error: {options.workflow}: {error}; export it with 'Export (API)' in ComfyUI",
                file=sys.stderr,
            )
            return 2
        for image in server.images(server.run(prompt, seconds=3600)):
            print(_keep(image), flush=True)
    return 0


def _write(options: argparse.Namespace, comfyui: Path) -> int:
    """Write the files of the named workflows. Raises: NotAvailableError, ServerError or BrowserError."""
    from .workflows import bundled
    from .writing import write_workflows

    known = bundled()
    unknown = set(options.names) - set(known)
    if unknown:
        print(f"error: NAME must be one of {', '.join(known)}, got {min(unknown)}", file=sys.stderr)
        return 2
    python = find_python()
    browser = find_browser_python(python)
    base = None if options.base is None else options.base.resolve()
    with Server(comfyui, python, base=base, arguments=("--cpu",)) as server:
        names = options.names or [name for name, workflow in known.items() if workflow.is_ready]
        chosen = [known[name] for name in names]
        print(*write_workflows(server, browser, chosen), sep="\n")
    return 0


def _stay(server: Server) -> int:
    """Wait until the server ends or the user ends it."""
    print("press Ctrl-C to end it", file=sys.stderr)
    try:
        while server.is_alive():
            time.sleep(2)
    except KeyboardInterrupt:
        return 0
    raise ServerError(f"ComfyUI ended:\n{server.log()[-2000:]}")


def _keep(image: bytes) -> Path:
    """Write a picture into the current folder under a name that is free, and return it."""
    number = 1
    while (path := Path(f"comfyui-{number:03}.png")).exists():
        number += 1
    path.write_bytes(image)
    return path


def _has_accelerator(python: Path) -> bool:
    import subprocess

    code = "import torch; print(torch.cuda.is_available() or torch.backends.mps.is_available())"
    return (
        subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=False).stdout.strip()
        == "True"
    )


if __name__ == "__main__":
    sys.exit(main())
