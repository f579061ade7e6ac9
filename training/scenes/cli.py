"""The command line `python -m training.scenes`: write captioned scenes, judge captioned pictures."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from PIL import Image
from tqdm import tqdm

from training.cli import DONE, UNUSABLE, fail, run_command
from training.data.sample import SOURCE_ENDING
from training.files import write_atomic

from .errors import SceneError
from .folder import write_edits, write_folder
from .judge import ATTRIBUTES, Verdict, accuracy, judge


class _Parser(argparse.ArgumentParser):
    """Argument parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage."""
        raise SceneError(f"{message}; see {self.prog} --help")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code of `training.cli`."""
    try:
        options = _parser().parse_args(arguments)
    except SceneError as err:
        return fail(str(err), UNUSABLE)
    return run_command(options.run, options)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m training.scenes", description="Captioned scenes, written and judged.")
    commands = parser.add_subparsers(required=True, metavar="{write,judge}")
    write = commands.add_parser("write", help="write PNG files with captions in same-named .txt files")
    write.set_defaults(run=_write)
    write.add_argument("folder", type=Path, metavar="DIR", help="new or empty folder")
    write.add_argument("--count", type=int, required=True, help="number of scenes")
    write.add_argument("--seed", type=int, required=True, help="equal seeds give equal files")
    write.add_argument("--size", type=int, default=128, help="side of the pictures in pixels (128)")
    write.add_argument("--objects", choices=("one", "two", "mixed"), default="mixed", help="a scene (mixed)")
    write.add_argument(
        "--split",
        choices=("train", "test", "all"),
        default="train",
        help="train: no held-out meanings (default); test: only those; all: both",
    )
    write.add_argument(
        "--edits", action="store_true", help="pairs: a target, its source in .source.png, and what was asked"
    )
    write.add_argument("--force", action="store_true", help="write into a folder that holds files")
    judging = commands.add_parser(
        "judge",
        help="judge PNG files against the captions beside them, and edits",
    )
    judging.set_defaults(run=_judge)
    judging.add_argument("folder", type=Path, metavar="DIR", help="folder of PNG files with .txt files")
    judging.add_argument("--json", type=Path, metavar="FILE", help="also write the verdicts to FILE")
    for command in (write, judging):
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _write(options: argparse.Namespace) -> int:
    write = write_edits if options.edits else write_folder
    write(
        options.folder,
        options.count,
        options.seed,
        size=options.size,
        objects=options.objects,
        split=options.split,
        is_forced=options.force,
    )
    what = "edits" if options.edits else "scenes"
    sys.stdout.write(f"{options.count} {what} written to {options.folder}\n")
    return DONE


def _judge(options: argparse.Namespace) -> int:
    paths = _pictures(options.folder)
    if options.json is not None and not options.json.absolute().parent.is_dir():
        raise SceneError(f"--json must lie in an existing folder, got {options.json}; make its folder first")
    captions, verdicts = [], []
    for path in tqdm(paths, desc="judge", unit="image"):
        caption, verdict = _judge_file(path)
        captions.append(caption)
        verdicts.append(verdict)
    shares = accuracy(verdicts)
    sys.stdout.write(_table(verdicts, shares))
    if options.json is not None:
        images = [
            {"file": str(path), "caption": caption, **verdict}
            for path, caption, verdict in zip(paths, captions, verdicts, strict=True)
        ]
        content = {"count": len(images), "accuracy": shares, "images": images}
        write_atomic(options.json, json.dumps(content, indent=1) + "\n")
    return DONE


def _pictures(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise SceneError(f"{folder} must be a folder of PNG and .txt files, got no folder; check the path")
    paths = sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() == ".png" and not path.name.endswith(SOURCE_ENDING)
    )
    if not paths:
        raise SceneError(f"{folder} must hold PNG files, got none; write some with 'training.scenes write'")
    return paths


def _caption_of(path: Path) -> str:
    """What a picture is to show: the target's caption of an edit, the text beside any other."""
    is_edit = path.with_suffix(SOURCE_ENDING).exists()
    text = path.with_suffix(".json" if is_edit else ".txt")
    try:
        content = text.read_text(encoding="utf-8")
        return " ".join(str(json.loads(content)["target"] if is_edit else content).split())
    except FileNotFoundError as err:
        raise SceneError(
            f"{path} must have a caption, got no {text.name}; write it beside the image"
        ) from err
    except (OSError, UnicodeDecodeError) as err:
        raise SceneError(f"{text} must be readable UTF-8 text, got {err}; save it as UTF-8") from err
    except (ValueError, TypeError, KeyError) as err:
        raise SceneError(
            f"{text} must be JSON with the caption of the target under target, got {err}; write it again"
        ) from err


def _judge_file(path: Path) -> tuple[str, Verdict]:
    caption = _caption_of(path)
    try:
        with Image.open(path) as image:
            pixels = image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as err:
        raise SceneError(f"{path} must be an image that decodes, got {err}; replace or remove it") from err
    try:
        return caption, judge(pixels, caption)
    except SceneError as err:
        raise SceneError(f"{path}: {err}") from err


def _table(verdicts: Sequence[Verdict], shares: dict[str, float | None]) -> str:
    lines = [f"{'attribute':<12}{'accuracy':>9}{'images':>8}"]
    for name in (*ATTRIBUTES, "all"):
        share = shares[name]
        named = sum(verdict[name] is not None for verdict in verdicts)
        lines.append(f"{name:<12}{'-' if share is None else f'{share:.4f}':>9}{named:>8}")
    return "\n".join(lines) + "\n"
