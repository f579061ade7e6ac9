"""A ComfyUI server in a process of its own, with the extension linked in. Standard library only."""

import contextlib
import ctypes
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Any

EXTENSION = Path(__file__).resolve().parents[2]
LINK_NAME = "flowcore.nodes-test"  # not an identifier on purpose: a user may clone into any folder name
START_SECONDS = 600.0


class ServerError(Exception):
    """The server did not start, died, or refused a request."""


class Server:
    """Start with `with`; the base folder (models, input, output, user) is temporary unless one is given."""

    def __init__(
        self,
        comfyui: Path,
        python: Path,
        *,
        base: Path | None = None,
        arguments: tuple[str, ...] = (),
        port: int | None = None,
    ) -> None:
        """Remember what to start; nothing runs yet."""
        self.comfyui, self.python = comfyui, python
        self._is_temporary = base is None
        self.base = base or Path(tempfile.mkdtemp(prefix="flowcore-comfy-"))
        self.port = port or _free_port()
        self.arguments = arguments
        self.log_file = self.base / "server.log"
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Where the server listens."""
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> "Server":
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Start the server and wait until it answers."""
        link_extension(self.base)
        command = [
            str(self.python), str(self.comfyui / "main.py"),
            "--base-directory", str(self.base), "--port", str(self.port), "--disable-auto-launch",
            "--database-url", "sqlite:///:memory:", "--disable-api-nodes", *self.arguments,
        ]  # fmt: skip
        with self.log_file.open("wb") as log:
            self.process = subprocess.Popen(
                command,
                cwd=self.comfyui,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment(),
                preexec_fn=_die_with_parent if sys.platform == "linux" else None,  # noqa: PLW1509 - one call
            )
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end:
            if self.process.poll() is not None:
                raise ServerError(f"ComfyUI ended with {self.process.returncode}:\n{self.log()[-4000:]}")
            with contextlib.suppress(OSError):
                self.get("/system_stats")
                return
            time.sleep(0.3)
        self.stop()
        raise ServerError(f"ComfyUI did not answer in {START_SECONDS:.0f} s:\n{self.log()[-4000:]}")

    def stop(self) -> None:
        """End the server and remove its temporary folder."""
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(15)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        if self._is_temporary:
            _unlink(self.base / "custom_nodes" / LINK_NAME)
            shutil.rmtree(self.base, ignore_errors=True)

    def is_alive(self) -> bool:
        """Say whether the process runs and answers."""
        if self.process is None or self.process.poll() is not None:
            return False
        self.get("/system_stats")
        return True

    def log(self) -> str:
        """Return what the server has printed."""
        return self.log_file.read_text(encoding="utf-8", errors="replace") if self.log_file.is_file() else ""

    def get(self, path: str) -> Any:
        """Return the JSON answer of a GET request."""
        with urllib.request.urlopen(self.url + path, timeout=30) as answer:
            return json.loads(answer.read())

    def get_bytes(self, path: str) -> bytes:
        """Return the body of a GET request."""
        with urllib.request.urlopen(self.url + path, timeout=30) as answer:
            return bytes(answer.read())

    def post(self, path: str, body: Any = None) -> Any:
        """Return the JSON answer of a POST request, whatever its status; None for an empty one."""
        data = json.dumps({} if body is None else body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                text = answer.read()
        except urllib.error.HTTPError as error:
            text = error.read()
        return json.loads(text) if text.strip() else None

    def queue(self, prompt: dict[str, Any], **extra: Any) -> str:
        """Queue a prompt in API form and return its id.

        Raises: ServerError if the server finds a fault in any node.
        """
        answer = self.post("/prompt", {"prompt": prompt, "client_id": "flowcore-test", **extra})
        if "prompt_id" not in answer or answer.get("node_errors"):
            raise ServerError(json.dumps(answer))
        return str(answer["prompt_id"])

    def wait(self, prompt_id: str, seconds: float = 300.0) -> dict[str, Any]:
        """Return the history entry of a prompt once it has ended, in whatever way."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            entry = self.get(f"/history/{prompt_id}").get(prompt_id)
            if entry is not None:
                return dict(entry)
            if not self.is_alive():
                raise ServerError(f"ComfyUI died:\n{self.log()[-4000:]}")
            time.sleep(0.05)
        raise ServerError(f"prompt {prompt_id} did not end in {seconds:.0f} s:\n{self.log()[-4000:]}")

    def run(self, prompt: dict[str, Any], seconds: float = 300.0) -> dict[str, Any]:
        """Run a prompt and return its history entry.

        Raises: ServerError with the message of the node that failed.
        """
        entry = self.wait(self.queue(prompt), seconds)
        message = error_message(entry)
        if message is not None:
            raise ServerError(message)
        return entry

    def images(self, entry: dict[str, Any]) -> list[bytes]:
        """Return the PNG files that a run made, in order of nodes."""
        files = [image for output in entry["outputs"].values() for image in output.get("images", [])]
        return [self.get_bytes(f"/view?{urllib.parse.urlencode(file)}") for file in files]


def error_message(entry: dict[str, Any]) -> str | None:
    """Return the message of the node that failed, None if none did."""
    for kind, details in entry["status"]["messages"]:
        if kind == "execution_error":
            return str(details["exception_message"])
    return None


def environment() -> dict[str, str]:
    """Return the variables for ComfyUI's process: offline, and no more threads than cores."""
    own = {"HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1", "PYTHONUTF8": "1"}
    return {
        **os.environ,
        **own,
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(min(4, os.cpu_count() or 1))),
    }


def link_extension(base: Path) -> Path:
    """Link the extension into a base folder's custom_nodes, never copying it, and return the link."""
    link = base / "custom_nodes" / LINK_NAME
    link.parent.mkdir(parents=True, exist_ok=True)
    for folder in ("input", "output", "user", "models"):
        (base / folder).mkdir(exist_ok=True)
    if link.exists():
        return link
    if sys.platform == "win32":
        subprocess.run(
            ["cmd", "/c", "mklink", "/J", str(link), str(EXTENSION)], check=True, capture_output=True
        )
    else:
        link.symlink_to(EXTENSION, target_is_directory=True)
    return link


def _unlink(link: Path) -> None:
    """Remove a link (or a Windows junction) without touching what it points to."""
    with contextlib.suppress(OSError):
        if sys.platform == "win32":
            link.rmdir()
        else:
            link.unlink()


def _die_with_parent() -> None:
    """Have the kernel end this process when the one that started it is killed."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
