"""Command line: `python -m flowcore PROMPT` makes a picture; `inspect FILE` says what a file is.

Results go to stdout, progress to stderr. Exit codes: 0 done, 1 the run failed, 2 unusable arguments.
"""

import argparse
import contextlib
import dataclasses
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from .command_line import DONE, FAILED, UNUSABLE, Command, Parser, short_warnings
from .commands import COMMANDS
from .errors import FlowCoreError

if TYPE_CHECKING:
    from PIL import Image

    from .exo import TrunkOptions
    from .flow.steps import StepCallback, StepState
    from .pipeline import Pipeline
    from .settings import Settings
    from .vae.tiling import TileCallback

BATCH = 4
"""Pictures sampled at once."""
EXO_SETTINGS = ("iterations", "preserve", "eta", "schedule", "rewrite")
"""Options that models other than exo do not have."""


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
        with short_warnings():
            return command(options)
    except KeyboardInterrupt:
        return fail("interrupted", FAILED)
    except ModuleNotFoundError as err:
        if options.debug or err.name != "torch":
            raise
        return fail("package torch must be installed, found none; run: python -m pip install torch", UNUSABLE)
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
        "with them; the trunk of an exo model (what the model file names)",
    )
    add("--text-mode", choices=("sequence", "pooled"), help="one token a word, or one vector (the model's)")
    _add_sampling(parser.add_argument_group("sampling").add_argument)
    add = parser.add_argument_group("starting from a picture").add_argument
    add("--init", metavar="IMAGE", help="picture to start from")
    add(
        "--strength",
        type=float,
        metavar="X",
        help="how far it is taken back to noise, in (0, 1] (0.6; 1 with --mask, and for exo)",
    )
    add("--mask", metavar="IMAGE", help="white where the picture is replaced, black where it is kept")
    _add_exo(parser.add_argument_group("exo models").add_argument)
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
    add("--shift", type=float, metavar="X", help="above 1: more steps at high noise (the model's own)")
    add("--cfg", type=float, metavar="X", help="guidance scale, 1 = none (2; exo 4)")
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


def _add_exo(add: Callable[..., argparse.Action]) -> None:
    """Add the options of exo models."""
    add("--iterations", type=int, metavar="T", help="refinements in each step, 1 to 8 (4)")
    add(
        "--preserve",
        type=float,
        metavar="X",
        help="0 to 1: keep what no edit marks as it is in the picture of --init (0)",
    )
    add("--eta", type=float, metavar="X", help="0 to 1: new noise in each step (0)")
    add(
        "--rewrite",
        action=argparse.BooleanOptionalAction,
        help="whether a model that can do so says what the picture of --init becomes, and draws that instead "
        "of the prompt as it is (yes)",
    )
    add("--schedule", metavar="NAME", help="shift, or flux2, whose shift follows from size and steps (shift)")
    add(
        "--trunk-dtype",
        metavar="NAME",
        help="of the trunk's weights: float32, bfloat16, float16, int8, or nf4 (4 bits; needs bitsandbytes) "
        "(the model's)",
    )
    add(
        "--offload",
        metavar="NAME",
        help="what of the trunk lies on the CPU until it is needed: none, vision, or layers (slow) (none)",
    )
    add("--mask-out", metavar="FILE", help="PNG file for the mask of the edits, white = edited")
    add("--dry-run", action="store_true", help="print how much memory it takes, and make nothing")
    add("--memory", metavar="SIZE", help="of --dry-run: whether it fits so much, such as 32GB")


def picture(options: argparse.Namespace) -> int:
    """Make the pictures and print their paths."""
    from . import images
    from .errors import ConfigError

    if options.count < 1:
        raise ConfigError(f"--count must be at least 1, got {options.count}")
    if options.dry_run:
        return plan(options)
    seeds = list(range(options.seed, options.seed + options.count))
    targets = [target_path(options.out, seed, options.count) for seed in seeds]
    check_early(options)
    init, mask = (images.read_image(path) if path else None for path in (options.init, options.mask))
    pipeline = open_pipeline(options)
    settings = settings_of(options, pipeline.settings_type, pipeline.model.architecture.name)
    pipeline.vae.on_tile = None if options.quiet else tile_progress()
    unknown = pipeline.text_encoder.unknown_words(options.prompt)
    if unknown:
        print(f"note: the text encoder does not know {', '.join(unknown)}", file=sys.stderr)
    command = shlex.join(["python", "-m", "flowcore", *options.words])
    for start in range(0, len(seeds), BATCH):
        some = seeds[start : start + BATCH]
        with progress(settings.num_steps, f"pictures {start + 1}-{start + len(some)}", options.quiet) as step:
            made = make(pipeline, options.prompt, some, settings, init=init, mask=mask, callback=step)
        for (image, edits), target, seed in zip(made, targets[start : start + BATCH], some, strict=True):
            images.add_settings(image, {"command": command, "init": options.init, "mask": options.mask})
            print(images.save_image(image, target), flush=True)
            if options.mask_out and edits is not None:
                print(
                    images.save_image(edits, target_path(options.mask_out, seed, options.count)), flush=True
                )
    return DONE


def open_pipeline(options: argparse.Namespace) -> "Pipeline":
    """Return the pipeline that the options ask for."""
    from .pipeline import Pipeline  # only now: it takes seconds

    return Pipeline.from_files(
        options.model,
        vae=options.vae,
        text_encoder=options.text_encoder,
        text_mode=options.text_mode,
        device=options.device,
        dtype=options.dtype,
        tile=options.tile,
        attention=options.attention,
        trunk=trunk_options(options),
    )


def plan(options: argparse.Namespace) -> int:
    """Print the memory that a picture takes."""
    from .exo import TrunkOptions
    from .exo.dry_run import Request, file_plan
    from .exo.memory_plan import parse_memory, plan_table
    from .exo.settings import ExoSettings

    settings = settings_of(options, ExoSettings, "exo")
    request = Request(
        prompt=options.prompt,
        width=options.width,
        height=options.height,
        has_picture=options.init is not None,
        is_guided=settings.cfg_scale != 1,
        batch=min(options.count, BATCH),
        dtype="bfloat16" if options.dtype == "auto" else options.dtype,
        trunk=trunk_options(options) or TrunkOptions(),
        tile=options.tile,
    )
    memory = None if options.memory is None else parse_memory(options.memory)
    print(plan_table(file_plan(options.model, request, vae=options.vae), memory))
    return DONE


def trunk_options(options: argparse.Namespace) -> "TrunkOptions | None":
    """Return how the trunk of an exo model is to be loaded; None if nothing is said of it."""
    if options.trunk_dtype is None and options.offload is None:
        return None
    from .exo import TrunkOptions

    return TrunkOptions(dtype=options.trunk_dtype or "auto", offload=options.offload or "none")


def make(
    pipeline: "Pipeline",
    prompt: str,
    seeds: Sequence[int],
    settings: "Settings",
    *,
    init: "Image.Image | None",
    mask: "Image.Image | None",
    callback: "StepCallback",
) -> "list[tuple[Image.Image, Image.Image | None]]":
    """Return a picture for each seed, and the mask of its edits where the model gives one."""
    from .exo import ExoPipeline

    prompts = [prompt] * len(seeds)
    if not isinstance(pipeline, ExoPipeline):
        found = pipeline.generate(prompts, seeds, settings, init_image=init, mask=mask, callback=callback)
        return [(image, None) for image in found]
    inits = None if init is None else [init] * len(seeds)
    refined = pipeline.refine(prompts, seeds, settings, init_images=inits, mask=mask, callback=callback)
    return [(one.image, one.info.mask_image()) for one in refined]


def check_early(options: argparse.Namespace) -> None:
    """Check the settings before anything is loaded. Raises: ConfigError."""
    from .images import png_path
    from .settings import Settings

    if options.mask_out is not None:
        png_path(options.mask_out)
    if any(getattr(options, name) is not None for name in EXO_SETTINGS):
        from .exo import ExoSettings

        settings_of(options, ExoSettings, "exo")
    else:
        settings_of(options, Settings, "any")


def settings_of(options: argparse.Namespace, kind: "type[Settings]", model: str) -> "Settings":
    """Return the settings that the options ask for; what is not given is as the kind has it.

    Raises: ConfigError for a value out of range, and for an option that the model does not have.
    """
    from .errors import ConfigError

    given = {
        "negative_prompt": options.negative,
        "width": options.width,
        "height": options.height,
        "num_steps": options.steps,
        "cfg_scale": options.cfg,
        "cfg_rescale": options.cfg_rescale,
        "cfg_zero": options.cfg_zero,
        "cfg_interval": (options.cfg_interval[0], options.cfg_interval[1]),
        "solver": options.solver,
        "shift": options.shift,
        "strength": options.strength,
        **{name: getattr(options, name) for name in EXO_SETTINGS},
    }
    if options.strength is None and options.init and not options.mask:
        given["strength"] = kind.init_strength
    chosen = {name: value for name, value in given.items() if value is not None}
    known = {field.name for field in dataclasses.fields(kind)}
    foreign = [name for name in chosen if name not in known]
    if options.mask_out is not None and "iterations" not in known and model != "any":
        foreign.append("mask_out")
    if foreign:
        raise ConfigError(f"--{foreign[0].replace('_', '-')} must go with an exo model, got {model}")
    return kind(**chosen)


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


if __name__ == "__main__":
    sys.exit(main())
