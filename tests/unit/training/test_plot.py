"""`training.plot`."""

from pathlib import Path

import pytest
from PIL import Image

from tests.unit.training.workspace import error_line
from training.plot import main


def write_run(folder: Path, *rows: str) -> Path:
    folder.mkdir()
    lines = ["step,loss,lr,grad_norm,seconds", *rows]
    (folder / "metrics.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def test_one_picture_of_several_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [write_run(tmp_path / name, "1,0.5,1,1,1", "2,0.25,1,1,1") for name in ("a", "b")]
    assert main([str(run) for run in runs]) == 0
    assert capsys.readouterr().out == f"{runs[0] / 'plots' / 'loss.png'}\n"
    assert main([str(runs[0]), "--out", str(tmp_path / "x" / "y.png")]) == 0
    for path in (runs[0] / "plots" / "loss.png", tmp_path / "x" / "y.png"):
        with Image.open(path) as image:
            image.verify()


def test_mistakes_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "gone")]) == 2
    assert "gone: the run folder must hold a metrics.csv, found none" in error_line(capsys)
    assert main([str(write_run(tmp_path / "empty"))]) == 2
    assert "empty: metrics.csv must hold steps to plot, got none yet" in error_line(capsys)
    assert main([str(write_run(tmp_path / "odd", "1,x,1,1,1"))]) == 2
    assert "metrics.csv must be a table of numbers" in error_line(capsys)
