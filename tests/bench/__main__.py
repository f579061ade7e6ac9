"""`python -m tests.bench`: speed and memory, beside the machine's matrix product and the originals.

On a CPU seconds are processor seconds of one thread, so that other work on the machine does not count.
Exit codes: 0 done, 1 a forward is slower than stored or a row could not be measured, 2 unusable arguments.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from tests.bench.cases import IMAGE, IMAGE_GUIDED, KEPT, KINDS, LAYERS, Case, suite
from tests.bench.references import REFERENCES
from tests.bench.running import BenchError, Measured, measure

ALLOWED = 1.15
"""What a forward of the smoke suite may take, relative to its stored value."""
REPEATS = {"cpu": 5, "gpu": 9, "smoke": 9}
STORED = Path(__file__).with_name("smoke.json")


class UsageError(Exception):
    """The arguments cannot be used."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the rows, print them as they come, and return the exit code."""
    args = parse(arguments)
    try:
        references = find_references(args.reference)
        cases = find_cases(args.suite, args.arch, args.what or KINDS)
    except UsageError as err:
        print(f"error: {err}", file=sys.stderr)
        return 2
    measured: list[Measured] = []
    done: list[Case] = []
    is_failed = False
    print(HEADER, flush=True)
    for case, reference in pairs(cases, references):
        print(f"measuring {case.arch} {case.what} {case.size}", file=sys.stderr)
        try:
            one = measure_checked(case, reference, args)
        except BenchError as err:
            print(f"error: {err}", file=sys.stderr)
            is_failed = True
            continue
        measured.append(one)
        done.append(case)
        print(describe(one), flush=True)
    if args.store:
        store({one.row.arch: one.relative for one in measured})
    finish(measured, args.json)
    if any(case.what in (IMAGE, IMAGE_GUIDED, *LAYERS, *KEPT) for case in done):
        from tests.bench import exo_image, exo_layer, exo_speed  # only here: they take seconds

        rows = [one.row for one in measured]
        print(
            *(line for kind in (exo_image, exo_layer, exo_speed) for line in kind.notes(done, rows)), sep="\n"
        )
    return 1 if is_failed or any(one.row.ok is False for one in measured) else 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("--arch", nargs="+", metavar="NAME", help="only these architectures")
    parser.add_argument(
        "--what", nargs="+", choices=KINDS, metavar="ROW", help=f"only these rows: {', '.join(KINDS)}"
    )
    parser.add_argument("--suite", choices=("cpu", "gpu", "smoke"), default="cpu")
    parser.add_argument(
        "--reference",
        nargs="+",
        default=[],
        metavar="NAME=DIR",
        help=f"time the original in a checkout, too: {', '.join(REFERENCES)}",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows to this file")
    parser.add_argument(
        "--store", action="store_true", help="make what --suite smoke measures its stored values"
    )
    args = parser.parse_args(arguments)
    if args.store and args.suite != "smoke":
        parser.error("--store needs --suite smoke")
    return args


def find_references(named: Sequence[str]) -> list[tuple[str, str]]:
    """Names and folders of the originals."""
    found = []
    for text in named:
        name, _, folder = text.partition("=")
        if name not in REFERENCES:
            raise UsageError(f"--reference must name one of {', '.join(REFERENCES)}, got {text!r}")
        if not Path(folder).is_dir() or not folder:
            raise UsageError(f"--reference {name} must give a folder, got {folder!r}; use {name}=DIR")
        found.append((name, str(Path(folder).resolve())))
    return found


def find_cases(name: str, archs: Sequence[str] | None, kinds: Sequence[str]) -> list[Case]:
    """The rows of a suite of these kinds, of some architectures or of all."""
    cases = suite(name)
    known = sorted({case.arch for case in cases})
    unknown = sorted(set(archs or ()) - set(known))
    if unknown:
        raise UsageError(f"--arch must be among {', '.join(known)}, got {', '.join(unknown)}")
    if name == "gpu":
        import torch  # only here: it takes seconds

        if not torch.cuda.is_available():
            raise UsageError("--suite gpu must run on a machine with a CUDA device, got none; use cpu")
    return [case for case in cases if case.what in kinds and (not archs or case.arch in archs)]


def pairs(
    cases: Sequence[Case], references: Sequence[tuple[str, str]]
) -> Iterator[tuple[Case, tuple[str, str] | None]]:
    """Every case with each original that can do it, or alone."""
    for case in cases:
        fitting = [
            one
            for one in references
            if REFERENCES[one[0]].arch == case.arch and case.what in REFERENCES[one[0]].rows
        ]
        yield from ((case, one) for one in fitting or [None])


def measure_checked(case: Case, reference: tuple[str, str] | None, args: argparse.Namespace) -> Measured:
    """One row; in the smoke suite with the verdict. What looks slower than stored is measured once more."""
    device = "cuda" if args.suite == "gpu" else "cpu"

    def once() -> Measured:
        return measure(case, device=device, repeats=REPEATS[args.suite], reference=reference)

    stored = stored_values().get(case.arch) if args.suite == "smoke" and not args.store else None
    result = once()
    if stored is None:
        return result
    if result.relative > ALLOWED * stored:
        again = once()
        result = min(result, again, key=lambda one: one.relative)
    ok = result.relative <= ALLOWED * stored
    if not ok:
        print(
            f"error: {case.arch} must take at most {ALLOWED * stored:.1f} matrix products (stored {stored}), "
            f"got {result.relative:.1f}",
            file=sys.stderr,
        )
    return replace(result, row=replace(result.row, stored=stored, ok=ok))


def stored_values() -> dict[str, float]:
    """By architecture: the time of the smoke suite's forward, in matrix products."""
    values: dict[str, float] = json.loads(STORED.read_text(encoding="utf-8"))
    return values


def store(values: dict[str, float]) -> None:
    """Replace the stored values of the measured architectures."""
    known = stored_values() if STORED.exists() else {}
    rounded = {name: round(value, 1) for name, value in values.items()}
    STORED.write_text(json.dumps(known | rounded, indent=1) + "\n", encoding="utf-8")


HEADER = (
    f"{'architecture':14}{'what':24}{'size':72}{'dtype':10}{'batch':>5}{'seconds':>10}{'GFLOP/s':>9}"
    f"{'share':>7}{'peak MiB':>10}{'original s':>11}{'original MiB':>13}"
    f"{'ratio':>7}{'verdict':>9}"
)


def describe(measured: Measured) -> str:
    """One line of the table under HEADER."""
    row = measured.row
    verdict = {None: "", True: "ok", False: "slower"}[row.ok]
    return (
        f"{row.arch:14}{row.what:24}{row.size:72}{row.dtype:10}{row.batch:>5}{row.seconds:>10.3f}"
        f"{number(row.gflops, 1):>9}{number(row.share, 2):>7}{row.peak_mib:>10.0f}"
        f"{number(row.reference_seconds, 3):>11}{number(measured.reference_peak_mib, 0):>13}"
        f"{number(row.ratio, 2):>7}{verdict:>9}"
    )


def number(value: float | None, digits: int) -> str:
    """The value with so many decimals, or a dash."""
    return "-" if value is None else f"{value:.{digits}f}"


def finish(measured: Sequence[Measured], path: Path | None) -> None:
    """Print the matrix product's speed, and write the JSON file."""
    peak = max((one.peak_gflops for one in measured), default=None)
    print(f"matrix product, the fastest beside a row: {number(peak, 1)} GFLOP/s")
    if path is not None:
        rows = [asdict(one.row) for one in measured]
        path.write_text(json.dumps({"peak_gflops": peak, "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
