"""The command line `python -m training.scenes`: write captioned scenes, judge captioned pictures."""

from __future__ import annotations

import argparse
import errno
import json
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from PIL import Image
from tqdm import tqdm

from .errors import SceneError
from .folder import write_folder
from .judge import ATTRIBUTES, Verdict, accuracy, judge

_FAILED, _UNUSABLE, _STOPPED = 1, 2, 3
_DISK_ERRORS = (errno.ENOSPC, errno.EIO, errno.EDQUOT)


class _Parser(argparse.ArgumentParser):
    """Argument parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage."""
        raise SceneError(f"{message}; see {self.prog} --help")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code: 0 done, 1 failed, 2 unusable arguments, 3 interrupted."""
    is_debug = "--debug" in (sys.argv[1:] if arguments is None else arguments)
    try:
        options = _parser().parse_args(arguments)
        if options.command == "write":
            _write(options)
        else:
            _judge(options.folder, options.json)
    except SceneError as error:
        return _report(str(error), _UNUSABLE, is_debug=is_debug)
    except OSError as error:
        code = _FAILED if error.errno in _DISK_ERRORS else _UNUSABLE
        message = f"cannot use {error.filename or 'the folder'}: {error.strerror or error}; check path and rights"
        return _report(message, code, is_debug=is_debug)
    except KeyboardInterrupt:
        sys.stderr.write("stopped; the files written so far are whole\n")
        return _STOPPED
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m training.scenes", description="Captioned scenes: write them, judge them.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="{write,judge}")
    write = commands.add_parser("write", help="write a folder of PNG files with captions in same-named .txt files")
    write.add_argument("folder", type=Path, metavar="DIR", help="new or empty folder")
    write.add_argument("--count", type=int, required=True, help="number of scenes")
    write.add_argument("--seed", type=int, required=True, help="equal seeds give equal files")
    write.add_argument("--size", type=int, default=128, help="side of the pictures in pixels (128)")
    write.add_argument("--objects", choices=("one", "two", "mixed"), default="mixed", help="objects a scene (mixed)")
    write.add_argument(
        "--split",
        choices=("train", "test", "all"),
        default="train",
        help="train: no held-out meanings (default); test: only those; all: both",
    )
    write.add_argument("--force", action="store_true", help="write into a folder that holds files")
    judging = commands.add_parser("judge", help="judge PNG files against the captions beside them")
    judging.add_argument("folder", type=Path, metavar="DIR", help="folder of PNG files with .txt files")
    judging.add_argument("--json", type=Path, metavar="FILE", help="also write the verdicts to FILE")
    for command in (write, judging):
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _write(options: argparse.Namespace) -> None:
    write_folder(
        options.folder,
        options.count,
        options.seed,
        size=options.size,
        objects=options.objects,
        split=options.split,
        is_forced=options.force,
    )
    sys.stdout.write(f"{options.count} scenes written to {options.folder}\n")


def _judge(folder: Path, json_file: Path | None) -> None:
    paths = _pictures(folder)
    if json_file is not None and not json_file.absolute().parent.is_dir():
        raise SceneError(f"--json must name a file in an existing folder, got {json_file}; make its folder first")
    captions, verdicts = [], []
    for path in tqdm(paths, desc="judge", unit="image"):
        caption, verdict = _judge_file(path)
        captions.append(caption)
        verdicts.append(verdict)
    shares = accuracy(verdicts)
    sys.stdout.write(_table(verdicts, shares))
    if json_file is not None:
        images = [
            {"file": str(path), "caption": caption, **verdict}
            for path, caption, verdict in zip(paths, captions, verdicts, strict=True)
        ]
        _write_json(json_file, {"count": len(images), "accuracy": shares, "images": images})


def _pictures(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise SceneError(f"{folder} must be a folder of PNG and .txt files, got no folder; check the path")
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() == ".png")
    if not paths:
        raise SceneError(f"{folder} must hold PNG files, got none; write some with 'training.scenes write'")
    return paths


def _judge_file(path: Path) -> tuple[str, Verdict]:
    text = path.with_suffix(".txt")
    if not text.is_file():
        raise SceneError(f"{path} must have a caption, got no file {text.name}; write the caption there")
    try:
        caption = " ".join(text.read_text(encoding="utf-8").split())
    except UnicodeDecodeError as error:
        raise SceneError(f"{text} must be UTF-8 text, got other bytes; save it as UTF-8") from error
    try:
        with Image.open(path) as image:
            pixels = image.convert("RGB")
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise SceneError(f"{path} must be a sound image, got one that does not decode; make it anew") from error
    try:
        return caption, judge(pixels, caption)
    except SceneError as error:
        raise SceneError(f"{path}: {error}") from error


def _table(verdicts: Sequence[Verdict], shares: dict[str, float | None]) -> str:
    lines = [f"{'attribute':<12}{'accuracy':>9}{'images':>8}"]
    for name in (*ATTRIBUTES, "all"):
        share = shares[name]
        named = sum(verdict[name] is not None for verdict in verdicts)
        lines.append(f"{name:<12}{'-' if share is None else f'{share:.4f}':>9}{named:>8}")
    return "\n".join(lines) + "\n"


def _write_json(path: Path, content: object) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(part, path)


def _report(message: str, code: int, *, is_debug: bool) -> int:
    if is_debug:
        traceback.print_exc()
    sys.stderr.write(f"error: {' '.join(message.split())}\n")
    return code
