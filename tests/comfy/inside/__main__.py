"""Checks that need ComfyUI in the same process. Runs in ComfyUI's interpreter: `python inside COMFYUI BASE`.

Prints one JSON object: the name of each check, and null or what went wrong.
"""

import argparse
import asyncio
import gc
import importlib
import json
import sys
import time
import traceback
from pathlib import Path
from types import ModuleType

# In this order: utils before nodes, whose path hides that package. ComfyUI's own nodes load config_parser.
PARTS = (
    "utils.extra_config",
    "folder_paths",
    "nodes",
    "server",
    "comfy.sd",
    "comfy_api.latest",
    "comfy_config.config_parser",
)


def start_comfyui(comfyui: Path, base: Path) -> None:
    """Import ComfyUI's parts in its own order, without its command line and without an accelerator."""
    sys.path.insert(0, str(comfyui))
    from comfy.cli_args import args

    args.cpu = True
    args.use_pytorch_cross_attention = True  # as on accelerators; the server's tests use the CPU's default
    args.base_directory = str(base)
    for name in PARTS:
        importlib.import_module(name)


def load_extension(link: Path) -> tuple[ModuleType, float]:
    """Return the extension's module as ComfyUI loads it, and the seconds that took."""
    import nodes

    gc.collect()  # else a collection of ComfyUI's own objects may fall into the time that is measured
    start = time.perf_counter()
    if not asyncio.run(nodes.load_custom_node(str(link))):
        raise RuntimeError("ComfyUI could not load the extension")
    seconds = time.perf_counter() - start
    return sys.modules[str(link).replace(".", "_x_")], seconds


def main() -> int:
    """Run all checks, or only time the import."""
    parser = argparse.ArgumentParser()
    parser.add_argument("comfyui", type=Path)
    parser.add_argument("base", type=Path)
    parser.add_argument("--link", type=Path, required=True)
    parser.add_argument("--only-import", action="store_true")
    options = parser.parse_args()
    start_comfyui(options.comfyui, options.base)
    before = set(sys.modules)
    print("-- extension starts here --", file=sys.stderr, flush=True)
    extension, seconds = load_extension(options.link)
    print("-- extension ends here --", file=sys.stderr, flush=True)
    added = sorted(set(sys.modules) - before)
    if options.only_import:
        print(json.dumps({"seconds": seconds, "modules": added}))
        return 0
    from checks import CHECKS
    from context import Context

    context = Context(extension, options.base)
    results: dict[str, str | None] = {}
    for check in CHECKS:
        try:
            check(context)
            results[check.__name__] = None
        except Exception:  # noqa: BLE001 - every failure becomes a line of the report
            results[check.__name__] = traceback.format_exc()
    print(json.dumps(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
