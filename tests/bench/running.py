"""Rows of the table: workers started, asked in turns, and their answers put together."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from tests.bench.cases import PRODUCT_FLOP, Case, Job
from tests.bench.references import REFERENCES

ROOT = Path(__file__).resolve().parents[2]


class BenchError(Exception):
    """A measurement that did not come about; the message is one line."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of the result, by the names of the JSON file.

    seconds: median. gflops: 10^9 operations a second; share: of the matrix product's, measured in turns with
    it. ratio: to the original's seconds. stored and ok: of the smoke suite.
    """

    arch: str
    what: str
    size: str
    dtype: str
    batch: int
    seconds: float
    gflops: float | None
    share: float | None
    peak_mib: float
    reference_seconds: float | None = None
    ratio: float | None = None
    stored: float | None = None
    ok: bool | None = None


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A row, and what its file has no field for.

    peak_gflops: of the matrix product beside it. relative: the row's time in units of that product's.
    reference_peak_mib: memory of the original.
    """

    row: Row
    peak_gflops: float
    relative: float
    reference_peak_mib: float | None = None


class Worker:
    """A started worker process."""

    def __init__(self, process: "subprocess.Popen[str]", errors: Path, name: str) -> None:
        self.process, self.errors, self.name = process, errors, name

    def send(self, line: str) -> None:
        """Write a line to the process."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()
        except BrokenPipeError as err:
            raise self._failure() from err

    def receive(self) -> dict[str, float]:
        """The next answer. Raises: BenchError with the last line that the process wrote."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise self._failure()
        answer: dict[str, float] = json.loads(line)
        return answer

    def ask(self) -> dict[str, float]:
        """One measurement."""
        self.send("go")
        return self.receive()

    def _failure(self) -> BenchError:
        written = self.errors.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return BenchError(f"{self.name} failed: {written[-1] if written else 'it wrote no message'}")


@contextmanager
def start(job: Job, name: str) -> Iterator[Worker]:
    """A worker with its job; it ends with the context."""
    python = REFERENCES[job.reference[0]].python() if job.reference else sys.executable
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    if job.device == "cpu":
        environment["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        errors = Path(folder) / "stderr"
        with errors.open("w") as stream:
            process = subprocess.Popen(
                [python, "-m", "tests.bench.worker"],
                cwd=ROOT,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stream,
                text=True,
            )
        try:
            worker = Worker(process, errors, name)
            worker.send(job.to_json())
            yield worker
        finally:
            process.stdin.close()
            process.kill()
            process.wait()
            process.stdout.close()


def measure(case: Case, *, device: str, repeats: int, reference: tuple[str, str] | None = None) -> Measured:
    """Measure a case, and the original of `reference` (name, folder) in turns with it.

    Raises: BenchError if either cannot be run.
    """
    jobs = [Job(case, device)]
    if reference is not None:
        jobs.append(Job(case, device, reference))
    with ExitStack() as stack:
        workers, gflop = [], []
        for job in jobs:  # one after the other: they do not disturb each other's start
            name = f"{case.arch} {case.what} {case.size}"
            worker = stack.enter_context(start(job, f"{job.reference[0]}: {name}" if job.reference else name))
            workers.append(worker)
            gflop.append(worker.receive()["gflop"])
        answers = [[worker.ask() for worker in workers] for _ in range(repeats)]
    own = [answer[0] for answer in answers]
    seconds = median(answer["seconds"] for answer in own)
    product = median(answer["product_seconds"] for answer in own)
    theirs = median(answer[1]["seconds"] for answer in answers) if reference else None
    gflops = gflop[0] / seconds if gflop[0] else None
    peak_gflops = PRODUCT_FLOP / product / 1e9
    row = Row(
        arch=case.arch,
        what=case.what,
        size=f"{case.size}, {reference[0]}" if reference and reference[0] != case.arch else case.size,
        dtype=case.dtype,
        batch=case.batch,
        seconds=seconds,
        gflops=gflops,
        share=gflops / peak_gflops if gflops else None,
        peak_mib=own[-1]["peak_mib"],
        reference_seconds=theirs,
        ratio=median(a["seconds"] / b["seconds"] for a, b in answers) if reference else None,
    )
    # Least of both: on a busy machine, what the two suffer from shared caches differs from moment to moment.
    relative = min(answer["seconds"] for answer in own) / min(answer["product_seconds"] for answer in own)
    return Measured(
        row=row,
        peak_gflops=peak_gflops,
        relative=relative,
        reference_peak_mib=answers[-1][1]["peak_mib"] if reference else None,
    )
