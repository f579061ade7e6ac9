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
    """Write a model's tensors under other names, and print what was written."""
    from .inspection import convert_file

    sys.stdout.write(convert_file(options.source, options.target, options.layout) + "\n")
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
        description="Write the tensors of a model file under the names that other programs expect.",
    )
    parser.add_argument("source", metavar="IN", help="model file or bundled name, in any known layout")
    parser.add_argument("target", metavar="OUT", help="safetensors file, replaced if it exists")
    parser.add_argument(
        "--layout",
        default="bare",
        metavar="NAME",
        help="bare (the original names), or a prefix: diffusion_model, model.diffusion_model, ... (bare)",
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def budget(options: argparse.Namespace) -> int:
    """Print how many parameters each part of an architecture has."""
    from .models.exo.budget import budget_table

    sys.stdout.write(budget_table(options.presets) + "\n")
    return DONE


def budget_parser() -> Parser:
    """Return the options of `python -m flowcore budget`."""
    parser = Parser(
        prog="python -m flowcore budget",
        description="Count the parameters of each part, without building anything.",
    )
    parser.add_argument("architecture", choices=("exo",), help="exo: the one that is made of many parts")
    parser.add_argument("presets", nargs="*", metavar="PRESET", help="such as 8b (all)")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


COMMANDS: dict[str, tuple[Command, Callable[[], Parser]]] = {
    "inspect": (inspect, inspect_parser),
    "convert": (convert, convert_parser),
    "budget": (budget, budget_parser),
}
