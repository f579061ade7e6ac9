"""`python -m tests.golden PATH...`: compare the project with stored results; one row a case.

Exit codes: 0 everything holds, 1 something does not, 2 unusable arguments.
"""

import argparse
import importlib
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors import safe_open

from tests.golden.compare import Case, Checked, Options, Outcome, Row, Skipped, judge
from tests.golden.keys import is_key_table, table_fault
from tests.golden.timing import Timing, time_forward

HANDLERS = {
    arch: f"tests.golden.{arch}"
    for arch in ("exo", "flow", "flux", "single_stream", "t5gemma2_text_encoder", "tinyflux", "vae", "xut")
}
OWN_FILES = Path(__file__).parent


class UsageError(Exception):
    """The arguments cannot be used."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the comparison and return the exit code."""
    args = parse(arguments)
    try:
        files = find_files(args.path or [OWN_FILES], args.arch)
        options = Options(
            dtype=getattr(torch, args.dtype), device=check_device(args.device), compile=args.compile
        )
    except UsageError as err:
        print(f"error: {err}", file=sys.stderr)
        return 2
    rows = []
    for file in files:
        print(f"comparing {file}", file=sys.stderr)
        for row in file_rows(file, options, args):
            print(describe(row), flush=True)
            rows.append(row)
    counts = {
        verdict: sum(row.verdict == verdict for row in rows) for verdict in ("passed", "failed", "skipped")
    }
    print(", ".join(f"{count} {verdict}" for verdict, count in counts.items()))
    if args.json:
        cases = [{**asdict(row), "file": str(Path(row.file).resolve())} for row in rows]
        args.json.write_text(json.dumps({**counts, "cases": cases}, indent=1), encoding="utf-8")
    return 1 if counts["failed"] else 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.golden", description=__doc__)
    parser.add_argument(
        "path", nargs="*", type=Path, help="files or folders; default: the project's own copies"
    )
    parser.add_argument("--arch", help="only files of this architecture's folder")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--time", type=int, default=0, metavar="N", help="median seconds of N forwards")
    parser.add_argument("--backward", action="store_true", help="with --time: of forward and backward, too")
    parser.add_argument("--compile", action="store_true", help="whole models through torch.compile")
    parser.add_argument("--debug", action="store_true", help="stop with the traceback of a file that fails")
    return parser.parse_args(arguments)


def check_device(name: str) -> str:
    """The device, if it is there, with convolutions in full precision: torch's default for CUDA is TF32."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device must be cpu here, got cuda; torch sees no CUDA device")
    torch.backends.cudnn.allow_tf32 = False
    return name


def find_files(paths: Sequence[Path], arch: str | None) -> list[Path]:
    """The safetensors and JSON files under the paths, folders searched recursively."""
    files: list[Path] = []
    for path in paths:
        if not path.exists():
            raise UsageError(f"PATH must exist, got {path}")
        inside = sorted(path.rglob("*")) if path.is_dir() else [path]
        files += [file for file in inside if file.suffix in (".safetensors", ".json") and file.is_file()]
    if arch is not None:
        files = [file for file in files if arch in (file.resolve().parent.name, stated_arch(file))]
    if not files:
        raise UsageError(
            f"PATH must hold .safetensors or .json files, got none in {', '.join(map(str, paths))}"
        )
    return files


def stated_arch(file: Path) -> str | None:
    """The architecture that a file itself states."""
    if file.suffix == ".json":
        document = json.loads(file.read_text(encoding="utf-8"))
        arch = document.get("arch") if isinstance(document, dict) else None
        return arch if isinstance(arch, str) else None
    with safe_open(file, framework="pt") as opened:
        return (opened.metadata() or {}).get("arch")


def file_rows(file: Path, options: Options, args: argparse.Namespace) -> Iterator[Row]:
    """The rows of one file. Whatever it raises, and each output that no case covers, is a failure."""
    blank = Row(file=str(file), arch=file.resolve().parent.name, kind="", compared="file", verdict="failed")
    try:
        if file.suffix == ".json":
            yield from document_rows(file, blank, options)
        else:
            yield from tensor_rows(file, blank, options, args)
    except Exception as err:  # any fault of a file is a failed row, and the next file is tried
        if args.debug:
            raise
        yield replace(blank, reason=f"{type(err).__name__}: {' '.join(str(err).split())[:300]}")


def document_rows(file: Path, blank: Row, options: Options) -> Iterator[Row]:
    """The rows of a JSON file: a key table, or a document of its architecture."""
    document: Mapping[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    if is_key_table(document):
        blank = replace(blank, kind="keys")
        yield judged(Checked(f"{len(document)} keys and shapes", table_fault(document)), blank)
        return
    blank = replace(blank, arch=document["arch"], kind=document["kind"])
    yield from (judged(outcome, blank) for outcome in handler(blank.arch).document_cases(document, options))


def tensor_rows(file: Path, blank: Row, options: Options, args: argparse.Namespace) -> Iterator[Row]:
    """The rows of a safetensors file."""
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata() or {}
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a mapping
    blank = replace(blank, arch=metadata["arch"], kind=metadata.get("kind", ""))
    module = handler(blank.arch)
    timing = measure(module, tensors, metadata, options, args)
    left = {name for name in tensors if name.startswith("output.")}
    if not left:
        yield replace(blank, reason="the file has no output")
    for outcome in module.cases(tensors, metadata, options):
        row = judged(outcome, blank)
        if row.verdict == "failed" and row.relative is not None and options.dtype != torch.float32:
            floor = floor_of(row.compared, module, tensors, metadata, options)
            reason = f"limit {row.tolerance:.3g} not met, floor {floor:.3g}, ours {row.relative:.3g}"
            row = replace(row, reason=reason)
        if timing is not None and row.compared == "output.velocity":
            row = replace(row, **timing._asdict())
        left.discard(row.compared)
        yield row
    yield from (replace(blank, compared=name, reason="nothing computes it") for name in sorted(left))


def floor_of(
    output: str,
    module: ModuleType,
    tensors: Mapping[str, torch.Tensor],
    metadata: Mapping[str, str],
    options: Options,
) -> float:
    """The relative error of float32 arithmetic on matrices and their inputs rounded to the options' dtype."""
    outcomes = module.cases(tensors, metadata, options.floor())
    cases = (Case(*found) for found in outcomes if not isinstance(found, Checked | Skipped))
    relative = judge(next(case for case in cases if case.output == output)).relative
    return math.nan if relative is None else relative


def handler(arch: str) -> ModuleType:
    """The module with the cases of an architecture."""
    if arch not in HANDLERS:
        raise LookupError(f"architecture {arch} does not exist here; there are {', '.join(HANDLERS)}")
    return importlib.import_module(HANDLERS[arch])


def judged(outcome: Outcome | tuple[Any, ...], blank: Row) -> Row:
    """The row of one outcome."""
    if isinstance(outcome, Skipped):
        return replace(blank, compared=outcome.output, verdict="skipped", reason=outcome.reason)
    if isinstance(outcome, Checked):
        verdict = "failed" if outcome.reason else "passed"
        return replace(blank, compared=outcome.compared, verdict=verdict, reason=outcome.reason)
    case = Case(*outcome)
    found = judge(case)
    return replace(
        blank,
        compared=case.output,
        verdict="failed" if found.reason else "passed",
        **found._asdict(),
    )


def measure(
    module: ModuleType,
    tensors: Mapping[str, torch.Tensor],
    metadata: Mapping[str, str],
    options: Options,
    args: argparse.Namespace,
) -> Timing | None:
    """The seconds of a whole model's forward, where they are asked for and the file is one."""
    if not args.time or not hasattr(module, "timed_forward"):
        return None
    forward = module.timed_forward(tensors, metadata, options)
    return None if forward is None else time_forward(forward, args.time, options.device, args.backward)


def describe(row: Row) -> str:
    """A row as text."""
    numbers = "".join(
        f"  {label} {value:.3g}"
        for label, value in (("abs", row.max_abs), ("rel", row.relative), ("limit", row.tolerance))
        if value is not None
    )
    times = "".join(
        f"  {label} {value:.4g}"
        for label, value in (
            ("forward s", row.seconds),
            ("forward+backward s", row.backward_seconds),
            ("peak MiB", row.peak_mib),
        )
        if value is not None
    )
    reason = f"  ({row.reason})" if row.reason else ""
    return f"{row.verdict:7} {row.arch}/{Path(row.file).name}  {row.compared}{numbers}{times}{reason}"


if __name__ == "__main__":
    sys.exit(main())
