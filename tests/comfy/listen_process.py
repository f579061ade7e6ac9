"""Listen to a server's websocket from a process of ComfyUI's interpreter."""

import contextlib
import json
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.comfy.server import Server


@contextlib.contextmanager
def listening(
    python: Path, server: Server, client: str, seconds: float = 60.0
) -> Iterator[list[dict[str, Any]]]:
    """Give a list that holds all messages once the block has been left."""
    script = Path(__file__).with_name("listen.py")
    messages: list[dict[str, Any]] = []
    command = [str(python), str(script), server.url, client, str(seconds)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        messages.append(json.loads(process.stdout.readline()))  # the server greets every listener
        yield messages
        end = time.monotonic() + seconds
        for line in process.stdout:
            messages.append(json.loads(line))
            if time.monotonic() > end:
                process.kill()
