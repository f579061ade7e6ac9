"""What a run writes while it trains: metrics.csv, TensorBoard, the loss plot, the progress bar."""

from __future__ import annotations

import csv
import json
import time
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from training.files import write_atomic, write_failure

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

COLUMNS = ("step", "loss", "lr", "grad_norm", "seconds")


class MetricLog:
    """Rows of metrics.csv, mirrored to TensorBoard; a row is on disk when `write` returns."""

    def __init__(self, folder: Path, first_step: int, *, tensorboard: bool) -> None:
        """Cuts an existing file back to rows before `first_step`, so that no step stands twice."""
        self.path = folder / "metrics.csv"
        cut_back(self.path, COLUMNS, first_step)
        self._writer: SummaryWriter | None = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step)

    def write(self, row: dict[str, float]) -> None:
        """Appends one row; floats as `repr`, so equal runs give equal text."""
        line = [repr(row[name]) for name in COLUMNS]
        try:
            with self.path.open("a", encoding="utf-8", newline="") as file:
                csv.writer(file, lineterminator="\n").writerow(line)
        except OSError as err:
            raise write_failure(err, self.path) from err
        if self._writer:
            for name in COLUMNS[1:]:
                self._writer.add_scalar(f"train/{name}", row[name], int(row["step"]))

    def scalars(self, values: dict[str, float], step: int) -> None:
        """Other measurements of one step, to TensorBoard alone."""
        if self._writer:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)

    def __enter__(self) -> MetricLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, err: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._writer:
            self._writer.close()


def cut_back(path: Path, columns: tuple[str, ...], first_step: int) -> None:
    """Starts a CSV file with its header, or drops the rows of an existing one from `first_step` on."""
    rows = []
    if path.exists():
        with path.open(encoding="utf-8", newline="") as file:
            for row in csv.reader(file):
                if len(row) == len(columns) and row[0].isdigit() and int(row[0]) < first_step:
                    rows.append(row)
    text = "\n".join(",".join(row) for row in [list(columns), *rows]) + "\n"
    write_atomic(path, text)


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Rows of a metrics.csv."""
    with path.open(encoding="utf-8", newline="") as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


def write_status(folder: Path, state: str, step: int) -> None:
    """status.json: running, stopped, done or failed."""
    write_atomic(folder / "status.json", json.dumps({"state": state, "step": step, "time": time.time()}) + "\n")


def plot_loss(folders: list[Path], target: Path) -> None:
    """Draws the loss and its running mean over the steps, one curve a run folder."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for folder in folders:
        rows = read_metrics(folder / "metrics.csv")
        steps, losses = [r["step"] for r in rows], [r["loss"] for r in rows]
        (line,) = axes.plot(steps, losses, linewidth=0.6, alpha=0.35)
        axes.plot(steps, _running_mean(losses), color=line.get_color(), label=folder.name)
    axes.set(xlabel="step", ylabel="loss", yscale="log")
    axes.grid(visible=True, which="both", alpha=0.3)
    axes.legend()
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_name(f".tmp-{target.name}")
    figure.savefig(aside, dpi=110, format="png")
    plt.close(figure)
    aside.replace(target)


def _running_mean(values: list[float], decay: float = 0.95) -> list[float]:
    means, mean, weight = [], 0.0, 0.0
    for value in values:
        mean, weight = decay * mean + (1 - decay) * value, decay * weight + (1 - decay)
        means.append(mean / weight)
    return means
