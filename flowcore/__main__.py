"""Command line: `python -m flowcore PROMPT` makes a picture; `inspect FILE` says what a file is.

Results go to stdout, progress to stderr. Exit codes: 0 done, 1 the run failed, 2 unusable arguments.
"""

import argparse
import contextlib
import json
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from .errors import FlowCoreError

if TYPE_CHECKING:
    from .flow.steps import StepCallback, StepState
    from .settings import Settings
    from .vae.tiling import TileCallback

DONE, FAILED, UNUSABLE = 0, 1, 2
BATCH = 4
"""Pictures sampled at once."""
DEFAULT_STRENGTH = 0.6
"""Of --init without --mask and --strength."""

Command = Callable[[argparse.Namespace], int]


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong, on one line, and exit with 2."""
        self.exit(UNUSABLE, f"error: {' '.join(message.split())}; see python -m flowcore --help\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Return the exit code of a command line."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    name = words[0] if words and words[0] in COMMANDS and len(words) > 1 else None
    command, parser = COMMANDS[name] if name else (picture, picture_parser)
    options = parser().parse_args(words[1:] if name else words)
    options.words = words
    return run(command, options)


def run(command: Command, options: argparse.Namespace) -> int:
    """Return the exit code of a command; errors become one line, unless --debug asks for the traceback."""
    try:
        return command(options)
    except KeyboardInterrupt:
        return fail("interrupted", FAILED)
    except (FlowCoreError, OSError, RuntimeError) as err:
        if options.debug:
            raise
        is_unusable = isinstance(err, FlowCoreError) and not _is_failed_write(err)
        return fail(str(err) or type(err).__name__, UNUSABLE if is_unusable else FAILED)


def fail(message: str, code: int) -> int:
    """Print one error line and return the code."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return code


def _is_failed_write(err: FlowCoreError) -> bool:
    from .images import WriteError

    return isinstance(err, WriteError)


def picture_parser() -> Parser:
    """Return the options of `python -m flowcore PROMPT`."""
    parser = Parser(
        prog="python -m flowcore",
        description="Make a picture of PROMPT and print the path of its PNG file.",
        epilog="Also: python -m flowcore inspect FILE, python -m flowcore convert IN OUT. "
        'Example: python -m flowcore "a red circle left of a blue square" --out out.png',
    )
    parser.add_argument("prompt", metavar="PROMPT", help="what the picture shows")
    parser.add_argument("--negative", default="", metavar="TEXT", help="what guidance leads away from")
    add = parser.add_argument_group("parts").add_argument
    add("--model", default="xut-demo", metavar="NAME|FILE", help="bundled name or weight file (xut-demo)")
    add("--vae", metavar="NAME|FILE", help="autoencoder (the one that the model file names)")
    add(
        "--text-encoder",
        nargs="+",
        metavar="NAME|FILE",
        help="text encoder, or those of tokens and pooled vector, and their tokenizers where they have none "
        "with them (what the model file names)",
    )
    add("--text-mode", choices=("sequence", "pooled"), help="one token a word, or one vector (the model's)")
    _add_sampling(parser.add_argument_group("sampling").add_argument)
    add = parser.add_argument_group("starting from a picture").add_argument
    add("--init", metavar="IMAGE", help="picture to start from")
    add(
        "--strength",
        type=float,
        metavar="X",
        help="how far it is taken back to noise, in (0, 1] (0.6; with --mask 1)",
    )
    add("--mask", metavar="IMAGE", help="white where the picture is replaced, black where it is kept")
    add = parser.add_argument_group("output and machine").add_argument
    add("--out", metavar="FILE", help="PNG file, replaced if it exists (flowcore-SEED.png, never replaced)")
    add("--count", type=int, default=1, metavar="N", help="pictures, with the seeds SEED, SEED + 1, ... (1)")
    add("--device", default="auto", help="auto, cpu, cuda or mps (auto)")
    add("--dtype", default="auto", help="of the model: auto, float32, bfloat16 or float16 (auto)")
    add(
        "--attention",
        default="auto",
        metavar="NAME",
        help="auto (flash-attn where it is installed and fits), sdpa or flash (auto)",
    )
    add(
        "--tile",
        type=int,
        metavar="PIXELS",
        help="side of the tiles in which the autoencoder works, 0 = none (512 for large pictures)",
    )
    add("--quiet", action="store_true", help="no progress bar")
    add("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _add_sampling(add: Callable[..., argparse.Action]) -> None:
    """Add the options that decide the pixels."""
    add("--seed", type=int, default=0, metavar="N", help="start of the noise; same seed, same picture (0)")
    add("--width", type=int, metavar="W", help="pixels (the model's own, or those of --init)")
    add("--height", type=int, metavar="H", help="pixels (the model's own, or those of --init)")
    add("--steps", type=int, default=20, metavar="N", help="steps of the solver (20)")
    add(
        "--solver",
        default="euler",
        metavar="NAME",
        help="euler, heun, midpoint, rk4, dpmpp_2m, ddim, ... (euler)",
    )
    add("--shift", type=float, default=1.0, metavar="X", help="above 1: more steps at high noise (1)")
    add("--cfg", type=float, default=2.0, metavar="X", help="guidance scale, 1 = none (2)")
    add(
        "--cfg-rescale",
        type=float,
        default=0.0,
        metavar="X",
        help="0 to 1: keep contrast at a high scale (0)",
    )
    add(
        "--cfg-zero", action="store_true", help="CFG-Zero* guidance; the first step leaves the noise as it is"
    )
    add(
        "--cfg-interval",
        type=float,
        nargs=2,
        default=(0.0, 1.0),
        metavar=("LOW", "HIGH"),
        help="noise levels between which guidance acts (0 1)",
    )


def picture(options: argparse.Namespace) -> int:
    """Make the pictures and print their paths."""
    from . import images
    from .errors import ConfigError

    if options.count < 1:
        raise ConfigError(f"--count must be at least 1, got {options.count}")
    seeds = list(range(options.seed, options.seed + options.count))
    targets = [target_path(options.out, seed, options.count) for seed in seeds]
    settings = settings_of(options)
    init, mask = (images.read_image(path) if path else None for path in (options.init, options.mask))
    from .pipeline import Pipeline  # only now: it takes seconds

    pipeline = Pipeline.from_files(
        options.model,
        vae=options.vae,
        text_encoder=options.text_encoder,
        text_mode=options.text_mode,
        device=options.device,
        dtype=options.dtype,
        tile=options.tile,
        attention=options.attention,
    )
    pipeline.vae.on_tile = None if options.quiet else tile_progress()
    unknown = pipeline.text_encoder.unknown_words(options.prompt)
    if unknown:
        print(f"note: the text encoder does not know {', '.join(unknown)}", file=sys.stderr)
    command = shlex.join(["python", "-m", "flowcore", *options.words])
    for start in range(0, len(seeds), BATCH):
        some = seeds[start : start + BATCH]
        with progress(settings.num_steps, f"pictures {start + 1}-{start + len(some)}", options.quiet) as step:
            made = pipeline.generate(
                [options.prompt] * len(some), some, settings, init_image=init, mask=mask, callback=step
            )
        for image, target in zip(made, targets[start : start + BATCH], strict=True):
            images.add_settings(image, {"command": command, "init": options.init, "mask": options.mask})
            print(images.save_image(image, target), flush=True)
    return DONE


def settings_of(options: argparse.Namespace) -> "Settings":
    """Return the settings that the options ask for."""
    from .settings import Settings

    strength = options.strength
    if strength is None:
        strength = DEFAULT_STRENGTH if options.init and not options.mask else 1.0
    return Settings(
        negative_prompt=options.negative,
        width=options.width,
        height=options.height,
        num_steps=options.steps,
        cfg_scale=options.cfg,
        cfg_rescale=options.cfg_rescale,
        cfg_zero=options.cfg_zero,
        cfg_interval=(options.cfg_interval[0], options.cfg_interval[1]),
        solver=options.solver,
        shift=options.shift,
        strength=strength,
    )


def target_path(out: str | None, seed: int, count: int) -> Path:
    """Return where a picture goes: --out, with the seed in its name if there are several, else a new file."""
    from .images import png_path

    if out is not None:
        path = png_path(out)
        return path if count == 1 else path.with_stem(f"{path.stem}-{seed}")
    names = (f"flowcore-{seed}{suffix}.png" for suffix in ("", *(f"-{n}" for n in range(2, 10_000))))
    return next(path for path in map(Path, names) if not path.exists())


@contextlib.contextmanager
def progress(num_steps: int, what: str, is_quiet: bool) -> "Iterator[StepCallback]":
    """Show a bar on stderr; yields the callback that moves it."""
    from tqdm import tqdm

    with tqdm(total=num_steps, desc=what, unit="step", file=sys.stderr, disable=is_quiet) as bar:

        def step(state: "StepState") -> None:
            bar.total = state.num_steps
            bar.update(state.step + 1 - bar.n)

        yield step


def tile_progress() -> "TileCallback":
    """Return the callback that shows a bar on stderr for each picture in tiles."""
    from tqdm import tqdm

    bars: list[tqdm[NoReturn]] = []

    def done(number: int, total: int) -> None:
        if number == 1:
            bars.append(tqdm(total=total, desc="autoencoder", unit="tile", file=sys.stderr))
        bars[-1].update()
        if number == total:
            bars.pop().close()

    return done


def inspect(options: argparse.Namespace) -> int:
    """Print what a file is, as JSON."""
    from .inspection import describe_file

    print(json.dumps(describe_file(options.file), indent=2, ensure_ascii=False))
    return DONE


def convert(options: argparse.Namespace) -> int:
    """Write a model's tensors under other names, and print what was written."""
    from .inspection import convert_file

    print(convert_file(options.source, options.target, options.layout))
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

    print(budget_table(options.presets))
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


if __name__ == "__main__":
    sys.exit(main())
