"""Writes captions of images with Qwen3-VL: `python -m training.caption FOLDER --model MODEL`."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from flowcore.errors import ConfigError
from training.cli import DONE, STOPPED, parser, run_command
from training.stop import StopFlag

REQUEST = "Describe this picture."


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns 0 done, 1 failed, 2 unusable input, 3 stopped."""
    made = parser(
        "caption",
        "Write a caption file beside every image that has none. The same command again goes on.",
    )
    made.add_argument("folder", type=Path, metavar="FOLDER", help="images at any depth")
    made.add_argument(
        "--model", required=True, metavar="MODEL", help="folder of a Qwen3-VL of any size, or hub:OWNER/NAME"
    )
    made.add_argument(
        "--system", type=Path, metavar="FILE", help="system instruction, e.g. training/configs/botanical.txt"
    )
    made.add_argument(
        "--request", default=REQUEST, help=f"what is asked of each image (default: {REQUEST!r})"
    )
    made.add_argument("--max-tokens", type=int, default=256, help="longest answer (default: 256)")
    made.add_argument(
        "--caption-extension", default=".txt", metavar=".EXT", help="of the files (default: .txt)"
    )
    made.add_argument("--overwrite", action="store_true", help="replace caption files that are there")
    made.add_argument("--skip-broken", action="store_true", help="warn of images that do not decode, go on")
    made.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    made.add_argument(
        "--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"), help="of the weights"
    )
    stop = StopFlag()
    stop.listen()
    return run_command(lambda a: _run(a, stop), made.parse_args(arguments))


def _run(arguments: argparse.Namespace, stop: StopFlag) -> int:
    if arguments.max_tokens < 1:
        raise ConfigError(f"--max-tokens must be at least 1, got {arguments.max_tokens}")
    if not re.fullmatch(r"\.\w+", arguments.caption_extension):
        raise ConfigError(
            f"--caption-extension must be a dot and a name, got {arguments.caption_extension!r}"
        )
    system = _read_system(arguments.system)
    # Imported here, for these load torch: a signal before that would end the process.
    from training.locks import locked

    with locked(arguments.folder, "caption", stop):
        images = find_images(arguments.folder, arguments.caption_extension, is_forced=arguments.overwrite)
        if images:
            return _caption(images, arguments, system, stop)
    sys.stdout.write("0 captions written, for every image has one; --overwrite replaces them\n")
    return DONE


def _read_system(path: Path | None) -> str:
    """The system instruction of a file, "" for none. Raises: ConfigError."""
    if path is None:
        return ""
    try:
        text = path.read_text(encoding="utf-8-sig").strip()
    except (OSError, UnicodeDecodeError) as err:
        raise ConfigError(f"--system must be a readable UTF-8 text file, got {path} ({err})") from err
    if not text:
        raise ConfigError(f"--system must hold an instruction, got an empty file {path}")
    return text


def find_images(folder: Path, extension: str, *, is_forced: bool) -> list[Path]:
    """Images below a folder that have no caption file yet, or all of them; a killed writer's rest is removed.

    Raises: ConfigError if there is no such folder, or no image in it.
    """
    from training.data.folder import list_files

    if not folder.is_dir():
        raise ConfigError(f"{folder} must be a folder of images, got no folder; check the path")
    for path in folder.rglob(f".tmp-*{extension}"):
        if re.match(r"\.tmp-\d+-", path.name):
            path.unlink(missing_ok=True)
    images, _ = list_files(folder, extension)
    if not images:
        raise ConfigError(f"{folder} must hold images, got none")
    return [path for path in images if is_forced or not path.with_suffix(extension).exists()]


def _caption(images: Sequence[Path], arguments: argparse.Namespace, system: str, stop: StopFlag) -> int:
    from training.captioner import Captioner
    from training.data.buckets import Bucket
    from training.data.images import image_size, load_image
    from training.data.sample import SampleError
    from training.files import write_atomic

    captioner = Captioner(arguments.model, device=arguments.device, dtype=arguments.dtype)
    count = 0
    for path in tqdm(images, desc="caption", unit="image"):
        if stop:
            sys.stderr.write(f"stopped after {count} captions; the same command goes on\n")
            return STOPPED
        try:
            picture = load_image(path, Bucket(*image_size(path)))
        except SampleError as err:
            if not arguments.skip_broken:
                raise ConfigError(f"{err.path}: {err.reason}; remove it or add --skip-broken") from err
            sys.stderr.write(f"warning: {err.path}: {err.reason}; left out\n")
            continue
        text = captioner.caption(picture, arguments.request, system, max_tokens=arguments.max_tokens)
        if not text:
            sys.stderr.write(
                f"warning: {path}: the model says nothing in {arguments.max_tokens} tokens; left out\n"
            )
            continue
        write_atomic(path.with_suffix(arguments.caption_extension), text + "\n")
        count += 1
    sys.stdout.write(f"{count} captions written in {arguments.folder}\n")
    return DONE


if __name__ == "__main__":
    sys.exit(main())
