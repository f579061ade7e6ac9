"""ComfyUI loads this folder as an extension; pytest may import this file; an installed package lacks it.

Nothing is imported at module level: pytest imports the file outside of any package, and ComfyUI pays for
every import at its start.
"""

from typing import Any

WEB_DIRECTORY = "./web"


async def comfy_entrypoint() -> Any:  # noqa: ANN401 - comfy_api.latest.ComfyExtension, importable only in ComfyUI
    """Return the extension with all nodes; ComfyUI calls this once at its start."""
    from .nodes import extension

    return extension()
