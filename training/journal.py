"""What a run tells of its steps: files, and a bar on stderr. One process of a run keeps the journal."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from tqdm import tqdm

from training.config import LoopConfig
from training.log import ORDER_COLUMNS, CsvLog, MetricLog, write_status

if TYPE_CHECKING:
    from training.loop import Objective


class NoJournal:
    """The journal of a process that leaves it to another."""

    def __init__(self, config: LoopConfig, folder: Path, step: int) -> None:
        """Of a run in `folder` that stands at `step`."""

    def __enter__(self) -> NoJournal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, err: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def step(self, row: dict[str, float], objective: Objective) -> None:
        """Notes a step by its row of metrics."""

    def saved(self, step: int) -> None:
        """Notes a checkpoint of a step."""

    def scalars(self, values: dict[str, float], step: int) -> None:
        """Notes other measurements of a step."""


class Journal(NoJournal):
    """metrics.csv, data_order.csv, TensorBoard, status.json and the bar of progress."""

    def __init__(self, config: LoopConfig, folder: Path, step: int) -> None:
        """Continues the files of `folder` behind `step`."""
        self._config, self._folder = config, folder
        is_ordered = config.logging.data_order
        self._order = CsvLog(folder / "data_order.csv", ORDER_COLUMNS, step + 1) if is_ordered else None
        self._held = contextlib.ExitStack()
        tensorboard = config.logging.tensorboard
        self._metrics = self._held.enter_context(MetricLog(folder, step + 1, tensorboard=tensorboard))
        write_status(folder, "running", step)
        self._bar = self._held.enter_context(
            tqdm(
                total=config.train.steps, initial=step, desc=config.output.name, unit="step", file=sys.stderr
            )
        )

    def __exit__(
        self, kind: type[BaseException] | None, err: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._held.close()

    def step(self, row: dict[str, float], objective: Objective) -> None:
        """Writes the row at its interval, and the keys of the step's batch if they are asked for."""
        step = int(row["step"])
        self._bar.update()
        if self._order:
            bucket, keys = objective.batch_keys(step - 1)
            self._order.append([str(step), bucket, ";".join(" ".join(key.split()) for key in keys)])
        if step % self._config.logging.every_steps == 0 or step == self._config.train.steps:
            self._metrics.write(row)
            self._bar.set_postfix(loss=f"{row['loss']:.4f}", refresh=False)

    def saved(self, step: int) -> None:
        """Puts the step into status.json."""
        write_status(self._folder, "running", step)

    def scalars(self, values: dict[str, float], step: int) -> None:
        """Passes measurements to TensorBoard."""
        self._metrics.scalars(values, step)
