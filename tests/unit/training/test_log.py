"""metrics.csv, status.json, TensorBoard and the plot."""

import warnings
from pathlib import Path

import pytest
from PIL import Image

from flowcore.errors import ConfigError
from training.files import RunError
from training.log import COLUMNS, CsvLog, MetricLog, plot_loss, read_metrics, read_status, write_status


def row(step: int) -> dict[str, float]:
    return {"step": step, "loss": 0.1 * step + 1 / 3, "lr": 1e-4, "grad_norm": 2.5, "seconds": 0.25}


def log_steps(folder: Path, first: int, last: int) -> None:
    with MetricLog(folder, first, tensorboard=False) as log:
        for step in range(first, last + 1):
            log.write(row(step))


def test_rows_are_written_exactly_and_at_once(tmp_path: Path) -> None:
    with MetricLog(tmp_path, 1, tensorboard=False) as log:
        log.write(row(1))
        assert (tmp_path / "metrics.csv").read_text(encoding="utf-8") == (
            "step,loss,lr,grad_norm,seconds\n1,0.43333333333333335,0.0001,2.5,0.25\n"
        )
    assert read_metrics(tmp_path / "metrics.csv") == [row(1)]


def test_a_resumed_run_has_no_step_twice(tmp_path: Path) -> None:
    log_steps(tmp_path, 1, 6)
    log_steps(tmp_path, 4, 8)
    assert [r["step"] for r in read_metrics(tmp_path / "metrics.csv")] == [1, 2, 3, 4, 5, 6, 7, 8]


@pytest.mark.parametrize("tail", ["4,0.1", "4", "", "\0\0\0", "x,y,z,1,2\n", "4,1,1,1,1,1\n"])
def test_half_rows_of_a_killed_run_are_dropped(tmp_path: Path, tail: str) -> None:
    log_steps(tmp_path, 1, 3)
    with (tmp_path / "metrics.csv").open("a", encoding="utf-8") as file:
        file.write(tail)
    log_steps(tmp_path, 4, 5)
    assert [r["step"] for r in read_metrics(tmp_path / "metrics.csv")] == [1, 2, 3, 4, 5]


def test_fields_with_commas_and_quotes_survive_a_cut(tmp_path: Path) -> None:
    log = CsvLog(tmp_path / "order.csv", ("step", "keys"), 1)
    log.append(["1", 'a, "b".png;c.png'])
    log.append(["2", "d"])
    text = (tmp_path / "order.csv").read_text(encoding="utf-8")
    CsvLog(tmp_path / "order.csv", ("step", "keys"), 2).append(["2", "d"])
    assert (tmp_path / "order.csv").read_text(encoding="utf-8") == text


def test_a_row_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    with MetricLog(tmp_path, 1, tensorboard=False) as log:
        (tmp_path / "metrics.csv").unlink()
        (tmp_path / "metrics.csv").mkdir()
        with pytest.raises(RunError, match=r"metrics\.csv: could not be written"):
            log.write(row(1))


def test_tensorboard_gets_the_same_numbers(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the package itself, while it is imported
        event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
        with MetricLog(tmp_path, 1, tensorboard=True) as log:
            log.write(row(1))
            log.scalars({"judge/color": 0.5}, 1)
        events = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert set(events.Tags()["scalars"]) == {*(f"train/{name}" for name in COLUMNS[1:]), "judge/color"}
    assert events.Scalars("train/loss")[0].value == pytest.approx(row(1)["loss"])


def test_status_is_read_back(tmp_path: Path) -> None:
    write_status(tmp_path, "running", 7)
    status = read_status(tmp_path)
    assert (status["state"], status["step"]) == ("running", 7)
    assert status["time"] > 1e9


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff"])
def test_a_damaged_status_says_nothing(tmp_path: Path, content: bytes) -> None:
    assert read_status(tmp_path) == {}
    (tmp_path / "status.json").write_bytes(content)
    assert read_status(tmp_path) == {}


@pytest.mark.parametrize(
    "content",
    [b"", b"step,loss\n1,2\n", b"step,loss,lr,grad_norm,seconds\n1,x,1,1,1\n", b"\xff\xfe", b"a\n1,2\n"],
)
def test_a_file_that_is_no_metrics_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "metrics.csv"
    path.write_bytes(content)
    if content == b"":
        assert read_metrics(path) == []
        return
    with pytest.raises(
        ConfigError, match=r"metrics\.csv must be a table of numbers with the columns step, loss"
    ):
        read_metrics(path)


def test_the_plot_is_a_picture(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        log_steps(tmp_path / name, 1, 5)
    plot_loss([tmp_path / "a", tmp_path / "b"], tmp_path / "plots" / "loss.png")
    with Image.open(tmp_path / "plots" / "loss.png") as image:
        assert image.format == "PNG"
        assert image.width > 400
    assert [path.name for path in (tmp_path / "plots").iterdir()] == ["loss.png"]


def test_a_run_without_rows_has_no_plot(tmp_path: Path) -> None:
    log_steps(tmp_path, 1, 0)
    with pytest.raises(ConfigError, match=r"metrics\.csv must hold steps to plot, got none yet"):
        plot_loss([tmp_path], tmp_path / "loss.png")
