"""Command line: what is made, by whom, of which captions; the same command again goes on."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from flowcore.errors import ConfigError
from training.cli import DONE, STOPPED, parser, run_command
from training.stop import StopFlag

if TYPE_CHECKING:
    from training.trajectories.making import Job, Sources
    from training.trajectories.teachers import Request, Teacher

COUNT = 25_000
DTYPES = ("float16", "bfloat16", "float32")


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns 0 done, 1 failed, 2 unusable input, 3 stopped."""
    made = parser(
        "trajectories",
        "Store the latents to which a teacher leads noise, with captions. The same command again goes on.",
    )
    made.add_argument("out", type=Path, metavar="OUT", help="folder of shards and index.jsonl")
    source = made.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--teacher",
        metavar="NAME",
        help="bundled model, model file, diffusers FLUX folder, or hub:OWNER/NAME",
    )
    source.add_argument("--images", type=Path, metavar="DIR", help="captioned images instead of a teacher")
    made.add_argument("--prompts", type=Path, metavar="FILE", help="captions, one a line (default: built in)")
    made.add_argument("--count", type=int, help=f"records (default: {COUNT}, or every image)")
    made.add_argument("--seed", type=int, default=0, help="of the noise (default: 0)")
    made.add_argument("--width", type=int, help="pixels (default: the teacher's)")
    made.add_argument("--height", type=int, help="pixels (default: the teacher's)")
    made.add_argument("--steps", type=int, default=20, help="of the teacher (default: 20)")
    made.add_argument("--guidance", type=float, help="scale (default: the teacher's)")
    made.add_argument("--negative", default="", help="negative prompt of a model of this project")
    made.add_argument(
        "--source-steps",
        type=int,
        metavar="N",
        help="store a source of an edit beside each record: what so many steps make of its noise",
    )
    made.add_argument(
        "--source-prompts",
        type=Path,
        metavar="FILE",
        help="the same: what a caption of this file makes of its noise, one for each of --prompts",
    )
    made.add_argument(
        "--vae", metavar="NAME", help="store latents of this autoencoder, which belong to no noise"
    )
    made.add_argument("--batch", type=int, default=4, help="records at a time (default: 4)")
    made.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    made.add_argument(
        "--teacher-dtype",
        default="auto",
        choices=("auto", *DTYPES),
        help="of weights",
    )
    made.add_argument("--dtype", default="float16", choices=DTYPES, help="of what is stored")
    made.add_argument("--dry-run", action="store_true", help="print size and work, write nothing")
    made.add_argument("--json", action="store_true", help="with --dry-run: print one JSON object")
    made.add_argument(
        "--tflops", type=float, default=150.0, help="10^12 operations a second, for --dry-run (default: 150)"
    )
    stop = StopFlag()
    stop.listen()
    return run_command(lambda a: _run(a, stop), made.parse_args(arguments))


def _run(arguments: argparse.Namespace, stop: StopFlag) -> int:
    for name in ("count", "steps", "source_steps", "batch", "tflops"):
        value = getattr(arguments, name)
        if value is not None and value <= 0:
            raise ConfigError(f"--{name.replace('_', '-')} must be above 0, got {value}")
    if arguments.seed < 0:
        raise ConfigError(f"--seed must be 0 or more, got {arguments.seed}")
    if arguments.json and not arguments.dry_run:
        raise ConfigError("--json must come with --dry-run, got it alone; add --dry-run")
    # Imported here, for these load torch: a signal before that would end the process.
    from training.trajectories.captions import few_captions
    from training.trajectories.making import make_records

    job = _job(arguments)
    warning = few_captions(job.prompts, job.count) if arguments.teacher else None
    if warning:
        sys.stderr.write(f"warning: {warning}\n")
    if arguments.dry_run:
        plan = job.plan(arguments.tflops)
        sys.stdout.write((json.dumps(plan.to_dict()) if arguments.json else str(plan)) + "\n")
        return DONE
    if not make_records(arguments.out, job, stop):
        sys.stderr.write(f"stopped; the same command goes on in {arguments.out}\n")
        return STOPPED
    sys.stdout.write(f"{job.count} records in {arguments.out}\n")
    return DONE


def _job(arguments: argparse.Namespace) -> Job:
    """What is to be made. Raises: ConfigError, CheckpointError, DataError."""
    from training.trajectories.captions import read_prompts
    from training.trajectories.making import Job
    from training.trajectories.teachers import ImageFolder, Maker, Request

    request = Request(
        width=arguments.width,
        height=arguments.height,
        steps=arguments.steps,
        guidance=arguments.guidance,
        negative=arguments.negative,
        device=arguments.device,
        dtype=arguments.teacher_dtype,
    )
    if arguments.images is None:
        prompts, count = read_prompts(arguments.prompts), arguments.count or COUNT
        sources = _sources(arguments, len(prompts))
        maker: Maker = _teacher(arguments, request)
    else:
        if arguments.prompts or not arguments.vae:
            raise ConfigError(
                "--images must come with --vae, and without --prompts, for images have captions of their own"
            )
        if arguments.source_steps or arguments.source_prompts:
            raise ConfigError(
                "--images must come without --source-steps and --source-prompts, for no teacher makes them"
            )
        sources = None
        maker = images = ImageFolder(arguments.images, request)
        prompts, count = images.captions, arguments.count or len(images.captions)
        if count > len(prompts):
            raise ConfigError(f"--count must be at most {len(prompts)}, the number of images, got {count}")
    return Job(
        maker=maker,
        prompts=prompts,
        count=count,
        seed=arguments.seed,
        batch=arguments.batch,
        dtype=arguments.dtype,
        vae=arguments.vae,
        sources=sources,
    )


def _sources(arguments: argparse.Namespace, count: int) -> Sources | None:
    """What is stored as the picture before an edit. Raises: ConfigError if it would be the record itself."""
    from training.trajectories.captions import read_prompts
    from training.trajectories.making import Sources

    steps, path = arguments.source_steps, arguments.source_prompts
    if path is None:
        if steps is not None and steps >= arguments.steps:
            raise ConfigError(f"--source-steps must be below --steps {arguments.steps}, got {steps}")
        return None if steps is None else Sources(steps=steps, prompts=None)
    prompts = read_prompts(path, "--source-prompts")
    if arguments.prompts is None or len(prompts) != count:
        raise ConfigError(
            f"--source-prompts must hold as many prompts as the file of --prompts, {count}, got "
            f"{len(prompts)} in {path}"
        )
    return Sources(steps=steps, prompts=prompts)


def _teacher(arguments: argparse.Namespace, request: Request) -> Teacher:
    from training.trajectories.diffusers_teacher import DiffusersTeacher, is_pipeline
    from training.trajectories.teachers import FlowTeacher

    if is_pipeline(arguments.teacher):
        return DiffusersTeacher(arguments.teacher, request, with_weights=not arguments.dry_run)
    return FlowTeacher(arguments.teacher, request)
