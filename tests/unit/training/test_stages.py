"""Stages: their lengths, what changes in each, their optimizers, and exact continuation anywhere."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flowcore.errors import ConfigError
from tests.unit.training.workspace import (
    assert_equal_runs,
    error_line,
    metrics,
    run,
    run_config,
    settings,
    weights,
    write_config,
)
from training.loop import Run
from training.stages import resolve_length, stage_at, stages_of, trained_names, warmup_steps
from training.state import read_checkpoint

STAGES: list[dict[str, Any]] = [
    {"name": "first", "steps": 2, "train": {"trainable": [r"enc_blocks"]}},
    {
        "steps": 2,
        "train": {"trainable": [r"dec_blocks"], "batch_size": 2},
        "optimizer": {"name": "sgd", "lr": 0.01},
        "schedule": {"name": "constant"},
    },
    {"name": "last", "steps": 3},
]


def staged(folder: Path, **sections: Any) -> Path:
    train = {"stages": STAGES, "batch_size": 4}
    path = write_config(folder, train=train, checkpoint={"every_steps": 1, "keep": 9}, **sections)
    text = path.read_text(encoding="utf-8").replace("  steps: 4\n", "", 1)
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Configuration of a run in three stages, done without a stop."""
    path = staged(tmp_path_factory.mktemp("stages"), optimizer={"lr": 0.01})
    assert run(path) == 0
    return path


def state(path: Path, step: int, part: str = "weights") -> dict[str, Tensor]:
    folder = path.parent / "runs" / "run" / "checkpoints" / f"step-{step:08d}"
    return read_checkpoint(folder).tensors(part)


def changed(path: Path, before: int, after: int) -> set[str]:
    old, new = state(path, before), state(path, after)
    return {name for name in old if not torch.equal(old[name], new[name])}


def test_a_stage_changes_what_it_names_and_no_bit_besides(whole: Path) -> None:
    names = set(state(whole, 1))
    assert changed(whole, 1, 2) == {name for name in names if "enc_blocks" in name}
    assert changed(whole, 2, 4) <= {name for name in names if "dec_blocks" in name}
    assert len(changed(whole, 2, 4)) > 4
    last = changed(whole, 4, 7)
    assert last > changed(whole, 1, 2)
    assert any(not name.startswith("backbone.") for name in last)


def test_every_stage_begins_with_a_fresh_optimizer_and_its_own_curve(whole: Path) -> None:
    assert {float(t) for n, t in state(whole, 2, "optimizer").items() if n.endswith("step")} == {2.0}
    assert not any(n.endswith("exp_avg") for n in state(whole, 3, "optimizer"))
    assert {float(t) for n, t in state(whole, 5, "optimizer").items() if n.endswith("step")} == {1.0}
    rates = [float(row[2]) for row in metrics(whole.parent / "runs" / "run")[1:]]
    assert rates == pytest.approx([0.01, 0.005, 0.01, 0.01, 0.01, 0.0075, 0.0025])
    facts = [read_checkpoint(p).facts for p in sorted((whole.parent / "runs/run/checkpoints").iterdir())]
    assert [fact["stage"] for fact in facts] == [0, 0, 1, 1, 2, 2, 2]
    assert [fact["stage_first_step"] for fact in facts] == [0, 0, 2, 2, 4, 4, 4]


def test_the_average_goes_on_over_all_stages(whole: Path) -> None:
    folder = whole.parent / "runs" / "run" / "final"
    assert weights(folder / "ema.safetensors").keys() == weights(folder / "model.safetensors").keys()
    before, after = state(whole, 1, "ema"), state(whole, 4, "ema")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved <= {name for name in before if "enc_blocks" in name or "dec_blocks" in name}
    assert any("dec_blocks" in name for name in moved)


@pytest.mark.parametrize("stop", [1, 2, 3, 4, 6])
def test_a_stop_within_a_stage_or_at_its_end_changes_nothing(
    whole: Path, stop: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    advance = Run.advance

    def stopping(self: Run) -> dict[str, float]:
        row = advance(self)
        if self.step == stop:
            os.kill(os.getpid(), signal.SIGTERM)
        return row

    again = settings(f"output.name=stopped-{stop}")
    monkeypatch.setattr(Run, "advance", stopping)
    assert run(whole, *again) == 3
    monkeypatch.setattr(Run, "advance", advance)
    assert run(whole, *again) == 0
    assert_equal_runs(whole.parent / "runs" / f"stopped-{stop}", whole.parent / "runs" / "run")


def test_the_last_stage_may_be_made_longer_and_no_other(
    whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    longer = settings("output.name=longer", "schedule.name=constant")
    assert run(whole, *longer) == 0
    assert run(whole, *longer, *settings("train.stages.2.steps=4")) == 0
    assert metrics(whole.parent / "runs" / "longer")[-1][0] == "8"
    assert run(whole, *longer, *settings("train.stages.0.steps=3")) == 2
    assert "train.stages.0.steps must stay 2 to continue" in error_line(capsys)


def test_patterns_that_match_nothing_are_named_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_config(tmp_path, train={"trainable": ["backbone", "nothing"]})
    for arguments in ([], ["--dry-run"]):
        assert run(path, *arguments) == 2
        assert (
            "train.trainable: pattern must match a parameter that may change, got 'nothing'; there are"
            in (error_line(capsys))
        )
    assert not (tmp_path / "runs").exists()


def test_lengths_in_epochs_follow_from_the_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = run_config(tmp_path, train={"epochs": 2.5})
    config = config.model_copy(update={"train": config.train.model_copy(update={"steps": 1})})
    config.train.model_fields_set.discard("steps")
    assert resolve_length(config, 10).train.steps == 7
    stages = [{"epochs": 1}, {"steps": 4}, {"epochs": 1, "train": {"batch_size": 2}}]
    path = write_config(tmp_path, train={"stages": stages, "steps": 10})
    assert run(path) == 0  # 8 pictures: 2 + 4 + 4
    assert [row[0] for row in metrics(tmp_path / "runs" / "run")[1:]] == [str(n + 1) for n in range(10)]
    assert run(path) == 0
    assert run(path, *settings("train.steps=11")) == 2
    text = "train.steps must be the 10 steps of train.stages, got 11; leave it out"
    assert text in error_line(capsys)


def test_which_stage_a_step_lies_in(tmp_path: Path) -> None:
    stages = stages_of(run_config(tmp_path, train={"stages": STAGES, "steps": 7}))
    assert [(stage.name, stage.first, stage.last) for stage in stages] == [
        ("first", 0, 2),
        ("", 2, 4),
        ("last", 4, 7),
    ]
    assert [stage_at(stages, step) for step in range(9)] == [0, 0, 1, 1, 2, 2, 2, 2, 2]
    single = run_config(tmp_path)
    (alone,) = stages_of(single)
    assert (alone.first, alone.last, alone.config) == (0, 4, single)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ({"warmup_steps": 3}, 3),
        ({"warmup_share": 0.05}, 10),
        ({"warmup_share": 0.05, "warmup_steps": 1000}, 10),
        ({"warmup_share": 0.5, "warmup_steps": 30}, 30),
        ({"warmup_share": 0.05, "steps": 1000}, 50),
    ],
)
def test_the_warm_up_may_be_a_share(tmp_path: Path, schedule: dict[str, Any], expected: int) -> None:
    assert warmup_steps(run_config(tmp_path, train={"steps": 200}, schedule=schedule)) == expected


def test_what_was_frozen_before_stays_so() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    module[0].weight.requires_grad_(False)
    assert trained_names(module, ()) == ["0.bias", "1.weight", "1.bias"]
    assert trained_names(module, ["weight"]) == ["1.weight"]
    with pytest.raises(ConfigError, match=r"got '0\\\\.weight'; there are 0, 1"):
        trained_names(module, [r"0\.weight"])


def test_a_stage_overrides_what_it_names_and_nothing_else(tmp_path: Path) -> None:
    stage = {
        "steps": 7,
        "train": {"batch_size": 2, "exo": {"edit": 0.5}, "trainable": ["a"]},
        "optimizer": {"groups": [{"pattern": "b", "lr": 1.0}]},
    }
    config = run_config(
        tmp_path,
        train={"stages": [{"steps": 3}, stage], "exo": {"diffusion": 0.8}},
        optimizer={"lr": 0.5, "groups": [{"pattern": "a"}, {"pattern": "c"}]},
        schedule={"steps": 100, "warmup_steps": 4},
    )
    first, second = config.stage(0), config.stage(1)
    assert (first.train.steps, first.train.batch_size, first.train.trainable) == (3, 4, ())
    assert (second.train.steps, second.train.batch_size, second.train.trainable) == (7, 2, ("a",))
    assert (second.train.exo.diffusion, second.train.exo.edit) == (0.8, 0.5)
    assert second.optimizer.lr == 0.5
    assert [group.pattern for group in second.optimizer.groups] == ["b"]
    assert (second.schedule.warmup_steps, second.schedule.steps) == (4, None)
    assert first.model_copy(update={"train": config.train, "schedule": config.schedule}) == config
