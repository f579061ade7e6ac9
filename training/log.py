"""What a run writes while it trains: CSV files, TensorBoard, status.json, the loss plot."""

from __future__ import annotations

import csv
import io
import json
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from flowcore.errors import ConfigError
from training.files import rename, write_atomic, write_failure

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

COLUMNS = ("step", "loss", "lr", "grad_norm", "seconds")
ORDER_COLUMNS = ("step", "bucket", "keys")


class CsvLog:
    """A CSV file whose first column is the step; a row is on disk when `append` returns."""

    def __init__(self, path: Path, columns: Sequence[str], first_step: int) -> None:
        """Writes the header, or cuts a file back to rows before `first_step`: no step stands twice."""
        self.path = path
        text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
        rows = [next(csv.reader([line]), []) for line in text.replace("\0", "").splitlines()]
        kept = [
            row
            for row in rows
            if len(row) == len(columns) and row[0].isdecimal() and int(row[0]) < first_step
        ]
        write_atomic(path, _csv_text([columns, *kept]))

    def append(self, row: Sequence[str]) -> None:
        """Adds one row. Raises: RunError if the write fails."""
        try:
            with self.path.open("a", encoding="utf-8", newline="") as file:
                file.write(_csv_text([row]))
        except OSError as err:
            raise write_failure(err, self.path) from err


class MetricLog:
    """Rows of metrics.csv, mirrored to TensorBoard."""

    def __init__(self, folder: Path, first_step: int, *, tensorboard: bool) -> None:
        """Continues the files of `folder` at `first_step`."""
        self._rows = CsvLog(folder / "metrics.csv", COLUMNS, first_step)
        self._writer: SummaryWriter | None = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step)

    def write(self, row: dict[str, float]) -> None:
        """Appends one row; floats as `repr`, so equal runs give equal text."""
        self._rows.append([repr(row[name]) for name in COLUMNS])
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


def _csv_text(rows: Sequence[Sequence[str]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Rows of a metrics.csv. Raises: ConfigError if the file is none."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return [{name: float(row[name]) for name in COLUMNS} for row in csv.DictReader(file)]
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as err:
        columns = ", ".join(COLUMNS)
        raise ConfigError(f"{path} must be a table of numbers with the columns {columns}, got {err}") from err


def write_status(folder: Path, state: str, step: int) -> None:
    """status.json: running, stopped, done or failed."""
    values = {"state": state, "step": step, "time": time.time()}
    write_atomic(folder / "status.json", json.dumps(values) + "\n")


def read_status(folder: Path) -> dict[str, Any]:
    """Values of status.json; none if the file is absent or damaged."""
    try:
        values = json.loads((folder / "status.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def plot_loss(folders: Sequence[Path], target: Path) -> None:
    """Draws the loss and its running mean over the steps, one curve a run folder.

    Raises: ConfigError if a metrics.csv cannot be read or has no rows.
    """
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    curves = {folder: read_metrics(folder / "metrics.csv") for folder in folders}
    for folder, rows in curves.items():
        if not rows:
            raise ConfigError(f"{folder}: metrics.csv must hold steps to plot, got none yet")
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for folder, rows in curves.items():
        steps, losses = [r["step"] for r in rows], [r["loss"] for r in rows]
        (line,) = axes.plot(steps, losses, linewidth=0.6, alpha=0.35)
        axes.plot(steps, _running_mean(losses), color=line.get_color(), label=folder.resolve().name)
    axes.set(xlabel="step", ylabel="loss", yscale="log")
    axes.grid(visible=True, which="both", alpha=0.3)
    axes.legend()
    aside = target.with_name(f".tmp-{target.name}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(aside, dpi=110, format="png")
        rename(aside, target)
    except OSError as err:
        aside.unlink(missing_ok=True)
        raise write_failure(err, target) from err
    finally:
        plt.close(figure)


def _running_mean(values: Sequence[float], decay: float = 0.95) -> list[float]:
    means, mean, weight = [], 0.0, 0.0
    for value in values:
        mean, weight = decay * mean + (1 - decay) * value, decay * weight + (1 - decay)
        means.append(mean / weight)
    return means
