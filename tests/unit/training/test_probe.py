"""The probe: whether the own caption wins against one with another word."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from tests.unit.training.workspace import error_line, run, write_config
from training.probe import compare_words, main
from training.scenes import write_folder


class Hearing:
    """Errors of a model that knows colors and nothing else."""

    def __init__(self) -> None:
        captions = ["a red circle", "a large green star on a blue background"]
        self.data = SimpleNamespace(samples=[SimpleNamespace(caption=caption) for caption in captions])

    def errors(self, numbers: list[int], captions: list[str], level: float) -> Tensor:
        own = [self.data.samples[number].caption.split() for number in numbers]
        wrong = [
            {"red", "green"} & set(words) - set(told.split())
            for words, told in zip(own, captions, strict=True)
        ]
        return torch.tensor([1.5 if words else level for words in wrong])


def test_the_share_that_wins_and_the_rise_of_the_loss() -> None:
    objective = Hearing()
    assert compare_words(objective, "color", 9, 0.5) == {"count": 2, "heard": 1, "rise": 2}  # type: ignore[arg-type]
    assert compare_words(objective, "shape", 9, 0.5) == {"count": 2, "heard": 0, "rise": 0}  # type: ignore[arg-type]
    assert compare_words(objective, "size", 9, 0.5)["count"] == 1  # type: ignore[arg-type]
    assert compare_words(objective, "position", 9, 0.5) == {"count": 0, "heard": 0, "rise": 0}  # type: ignore[arg-type]
    assert compare_words(objective, "color", 1, 0.5)["count"] == 1  # type: ignore[arg-type]


@pytest.mark.parametrize("arch", ["xut", "exo"])
def test_a_run_is_probed_with_its_averaged_weights(
    tmp_path: Path, arch: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_folder(tmp_path / "images", 4, 1, size=32, is_quiet=True)
    path = write_config(tmp_path, model={"arch": arch}, train={"steps": 1}, checkpoint={"every_steps": 1})
    assert run(path) == 0
    folder = tmp_path / "runs" / "run"
    figures = tmp_path / "figures.json"
    assert main([str(folder), "--count", "2", "--level", "0.8", "--json", str(figures)]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "step 1, noise level 0.8"
    rows = json.loads(figures.read_text(encoding="utf-8"))["words"]
    assert rows["color"]["count"] == 2
    assert 0 <= rows["color"]["heard"] <= 1
    assert len(out) == 2 + sum(row["count"] > 0 for row in rows.values())


def test_what_cannot_be_probed_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path), "--count", "0"]) == 2
    assert "--count must be at least 1 and --level lie between 0 and 1, got 0" in error_line(capsys)
    assert main([str(tmp_path)]) == 2
    assert "config.yaml: configuration must exist" in error_line(capsys)
