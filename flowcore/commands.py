"""The commands of the package besides making pictures: `python -m flowcore NAME ...`."""

import argparse
import json
import sys
from collections.abc import Callable

from .command_line import DONE, Command, Parser


def inspect(options: argparse.Namespace) -> int:
    """Print what a file is, as JSON."""
    from .inspection import describe_file

    sys.stdout.write(json.dumps(describe_file(options.file), indent=2, ensure_ascii=False) + "\n")
    return DONE


def convert(options: argparse.Namespace) -> int:
    """Write a model's or a LoRA's tensors under other names, and print what was written."""
    from .inspection import convert_file

    line = convert_file(options.source, options.target, options.layout, base=options.base)
    sys.stdout.write(line + "\n")
    return DONE


def inspect_parser() -> Parser:
    """Return the options of `python -m flowcore inspect`."""
    parser = Parser(
        prog="python -m flowcore inspect",
        description="Say what a weight file holds, or with which settings a picture was made, as JSON.",
    )
    parser.add_argument("file", metavar="FILE", help="weight file, folder, bundled name, or PNG picture")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def convert_parser() -> Parser:
    """Return the options of `python -m flowcore convert`."""
    parser = Parser(
        prog="python -m flowcore convert",
        description="Write the tensors of a model or LoRA file under the names that other programs expect.",
    )
    parser.add_argument(
        "source", metavar="IN", help="model or LoRA file, or bundled name, in any known layout"
    )
    parser.add_argument("target", metavar="OUT", help="safetensors file, replaced if it exists")
    parser.add_argument(
        "--layout",
        metavar="NAME",
        help="of a model bare (the original names), diffusers, or a prefix: diffusion_model, "
        "model.diffusion_model, ... (bare); of a LoRA diffusion_model, kohya, diffusers, or native, which is "
        "TinyFlux's own (diffusion_model)",
    )
    parser.add_argument(
        "--base",
        metavar="FILE",
        help="of a LoRA: the model file or bundled name that it is for (a published size that it fits)",
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def budget(options: argparse.Namespace) -> int:
    """Print how many parameters each part of an architecture has, and the memory of pictures if asked to."""
    from .models.exo.budget import budget_table

    sys.stdout.write(budget_table(options.presets) + "\n")
    if options.memory is not None:
        sys.stdout.write(memory_plans(options))
    return DONE


def memory_plans(options: argparse.Namespace) -> str:
    """Return the memory that a picture of each preset takes: with guidance and an initial image, 1024 px."""
    from .exo import TrunkOptions
    from .exo.dry_run import Request, preset_plan
    from .exo.memory_plan import parse_memory, plan_table
    from .models.exo import PRESETS

    memory = parse_memory(options.memory)
    trunk = TrunkOptions(dtype=options.trunk_dtype, offload=options.offload)
    request = Request(prompt=" " * 900, has_picture=True, trunk=trunk)
    tables = (
        f"\n{name}\n{plan_table(preset_plan(name, request), memory)}\n" for name in options.presets or PRESETS
    )
    return "".join(tables)


def budget_parser() -> Parser:
    """Return the options of `python -m flowcore budget`."""
    parser = Parser(
        prog="python -m flowcore budget",
        description="Count the parameters of each part, without building anything.",
    )
    parser.add_argument("architecture", choices=("exo",), help="exo: the one that is made of many parts")
    add = parser.add_argument
    add("presets", nargs="*", metavar="PRESET", help="such as 8b (all)")
    add("--memory", metavar="SIZE", help="also plan a picture, and say whether it fits so much, such as 32GB")
    add(
        "--trunk-dtype",
        default="auto",
        metavar="NAME",
        help="of the plan: bfloat16, int8, nf4, ... (bfloat16)",
    )
    add("--offload", default="none", metavar="NAME", help="of the plan: none, vision or layers (none)")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def merge(options: argparse.Namespace) -> int:
    """Write a trunk with an Exo file's changes, and the file without them."""
    from .exo.merging import merge_file

    sys.stdout.write(merge_file(options.source, options.target, trunk=options.trunk) + "\n")
    return DONE


def merge_parser() -> Parser:
    """Return the options of `python -m flowcore merge`."""
    parser = Parser(
        prog="python -m flowcore merge",
        description="Add the low-rank changes in an Exo file to its trunk for good: writes a folder with the "
        "trunk and an Exo file without them.",
    )
    parser.add_argument("source", metavar="IN", help="Exo file or bundled name")
    parser.add_argument("target", metavar="OUT", help="folder, new or empty")
    parser.add_argument("--trunk", metavar="FOLDER", help="the trunk (what the file names)")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


COMMANDS: dict[str, tuple[Command, Callable[[], Parser]]] = {
    "inspect": (inspect, inspect_parser),
    "convert": (convert, convert_parser),
    "budget": (budget, budget_parser),
    "merge": (merge, merge_parser),
}
