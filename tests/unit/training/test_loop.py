"""The training loop on a small objective: accumulation, clipping, values not finite, stops, resume."""

import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from flowcore.errors import CheckpointError
from tests.unit.training.workspace import run_config
from training.config import RunConfig
from training.files import RunError
from training.keys import generator
from training.log import read_metrics
from training.loop import Run, train
from training.state import newest_checkpoint, read_checkpoint
from training.stop import StopFlag

CPU = torch.device("cpu")


class Regression:
    """Mean squared error of a linear layer on drawn data; the stop flag can be set by a loss or a preview."""

    def __init__(self, scale: float = 1.0, poison: int | None = None, stop: StopFlag | None = None) -> None:
        torch.manual_seed(0)
        self.module: nn.Module = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
        self.scale, self.poison, self.stop = scale, poison, stop
        self.stop_at, self.previews = -1, list[int]()
        self.kind = "loss"

    def loss(self, step: int, part: slice) -> Tensor:
        draw = generator(0, "data", step)
        inputs, targets = torch.randn(8, 6, generator=draw), torch.randn(8, 3, generator=draw)
        if self.stop is not None and step == self.stop_at:
            self.stop.requested = True
        error = (self.module(inputs[part]) - targets[part]).square().mean() * self.scale
        if step == self.poison and self.kind == "loss":
            return error * math.nan
        if step == self.poison:
            weight = next(self.module.parameters())
            return error + (weight - weight).sum().sqrt()  # 0, with a gradient of infinity minus infinity
        return error

    def batch_keys(self, step: int) -> tuple[str, Sequence[str]]:
        return "all", [str(step), "a,b"]

    def preview(self, folder: Path, step: int, stop: StopFlag) -> dict[str, float]:
        self.previews.append(step)
        if self.stop is not None and step == self.stop_at:
            self.stop.requested = True
        stop.check()
        (folder / f"step-{step:08d}.txt").touch()
        return {"x": 1.0}


def make(folder: Path, objective: Regression | None = None, **sections: dict[str, object]) -> Run:
    config: RunConfig = run_config(folder, **{"train": {"batch_size": 8, "steps": 6}, **sections})
    return Run(config, objective or Regression(), CPU)


def gradients(run: Run) -> tuple[float, list[Tensor]]:
    loss = run._backward()
    return loss, [
        parameter.grad.clone() for parameter in run.module.parameters() if parameter.grad is not None
    ]


@pytest.mark.parametrize("micro", [1, 2, 4])
def test_accumulated_gradients_equal_those_of_the_whole_batch(tmp_path: Path, micro: int) -> None:
    whole = gradients(make(tmp_path))
    parts = gradients(make(tmp_path, train={"batch_size": 8, "steps": 6, "micro_batch_size": micro}))
    assert parts[0] == pytest.approx(whole[0], rel=1e-6)
    for part, full in zip(parts[1], whole[1], strict=True):
        assert torch.allclose(part, full, rtol=1e-5, atol=1e-7)


def weights(run: Run) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in run.module.parameters()]


def test_gradients_are_clipped_and_the_norm_told_as_it_was(tmp_path: Path) -> None:
    options = {
        "optimizer": {"name": "sgd", "lr": 1.0, "betas": [0, 0], "weight_decay": 0},
        "schedule": {"name": "constant"},
    }
    steps = {}
    for clip in (0.0, 0.01):
        run = make(tmp_path, train={"batch_size": 8, "steps": 6, "grad_clip": clip}, **options)
        before = weights(run)
        row = run.advance()
        moved = math.sqrt(
            sum(float((a - b).square().sum()) for a, b in zip(before, weights(run), strict=True))
        )
        steps[clip] = (row["grad_norm"], moved)
    assert steps[0.0][0] == steps[0.01][0] > 0.01
    assert steps[0.0][1] == pytest.approx(steps[0.0][0], rel=1e-4)
    assert steps[0.01][1] == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_a_value_that_is_not_finite_stops_the_run_at_its_step(tmp_path: Path, kind: str) -> None:
    objective = Regression(poison=3)
    objective.kind = kind
    run = make(tmp_path, objective)
    for _ in range(3):
        run.advance()
    before, average = weights(run), {k: v.clone() for k, v in run.ema.average.items()} if run.ema else {}
    with pytest.raises(RunError, match=rf"^step 4: {kind} must be finite, got .*nan; lower optimizer\.lr$"):
        run.advance()
    assert run.step == 3
    assert all(torch.equal(a, b) for a, b in zip(before, weights(run), strict=True))
    assert run.ema is not None
    assert all(torch.equal(run.ema.average[k], average[k]) for k in average)


def test_the_row_of_a_step(tmp_path: Path) -> None:
    run = make(tmp_path, schedule={"name": "constant", "warmup_steps": 4}, optimizer={"lr": 0.5})
    rows = [run.advance() for _ in range(3)]
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert [row["lr"] for row in rows] == [0.0, 0.125, 0.25]
    assert all(row["seconds"] > 0 for row in rows)


def folder_of(run: Run) -> Path:
    run.config.folder.mkdir(parents=True, exist_ok=True)
    return run.config.folder


def test_a_run_logs_saves_and_previews_at_its_intervals(tmp_path: Path) -> None:
    objective = Regression()
    run = make(
        tmp_path,
        objective,
        train={"batch_size": 8, "steps": 7},
        checkpoint={"every_steps": 3, "keep": 9},
        sampling={"every_steps": 2},
        logging={"every_steps": 3, "data_order": True},
    )
    folder = folder_of(run)
    assert train(run, folder, StopFlag())
    assert [row["step"] for row in read_metrics(folder / "metrics.csv")] == [3, 6, 7]
    saved = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert saved == ["step-00000003", "step-00000006", "step-00000007"]
    assert objective.previews == [2, 4, 6, 7]
    order = (folder / "data_order.csv").read_text(encoding="utf-8").splitlines()
    assert order[:2] == ["step,bucket,keys", '1,all,"0;a,b"']
    assert len(order) == 8


@pytest.mark.parametrize("place", ["loss", "preview"])
def test_a_stop_saves_the_step_it_came_in(tmp_path: Path, place: str) -> None:
    stop = StopFlag()
    objective = Regression(stop=stop)
    objective.stop_at = 4
    sampling = {"every_steps": 4 if place == "preview" else 0}
    run = make(tmp_path, objective, checkpoint={"every_steps": 100}, sampling=sampling)
    folder = folder_of(run)
    assert not train(run, folder, stop)
    step = 4 if place == "preview" else 5
    assert run.step == step
    assert [row["step"] for row in read_metrics(folder / "metrics.csv")][-1] == step
    found = newest_checkpoint(folder / "checkpoints", [])
    assert found is not None
    assert found.step == step


def test_a_stop_before_the_first_step_saves_nothing(tmp_path: Path) -> None:
    stop = StopFlag()
    stop.requested = True
    run = make(tmp_path)
    assert not train(run, folder_of(run), stop)
    assert not (folder_of(run) / "checkpoints").exists()


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_restored_run_goes_on_bit_for_bit(tmp_path: Path, precision: str, optimizer: str) -> None:
    options = {"precision": precision, "optimizer": {"name": optimizer, "lr": 0.01}}
    whole = make(tmp_path, **options)
    losses = []
    for step in range(6):
        if step == 3:
            whole.save(tmp_path)
        losses.append(whole.advance()["loss"])
    run = make(tmp_path, Regression(), **options)
    run.restore(read_checkpoint(tmp_path / "checkpoints" / "step-00000003"))
    assert [run.advance()["loss"] for _ in range(3)] == losses[3:]
    assert all(torch.equal(a, b) for a, b in zip(weights(run), weights(whole), strict=True))
    assert run.ema is not None
    assert whole.ema is not None
    assert all(torch.equal(run.ema.average[k], whole.ema.average[k]) for k in whole.ema.average)
    assert run.ema.updates == whole.ema.updates == 6


def test_a_checkpoint_of_another_model_is_refused_in_one_line(tmp_path: Path) -> None:
    run = make(tmp_path)
    run.advance()
    run.save(tmp_path)
    other = Regression()
    other.module = nn.Linear(3, 3)
    checkpoint = read_checkpoint(tmp_path / "checkpoints" / "step-00000001")
    with pytest.raises(CheckpointError, match=r"step-00000001 must be of this configuration, got another's"):
        make(tmp_path, other).restore(checkpoint)
    with pytest.raises(CheckpointError, match=r"must be of this configuration"):
        make(tmp_path, optimizer={"groups": [{"pattern": "bias", "name": "sgd"}]}).restore(checkpoint)


def test_sampling_with_the_average_leaves_the_run_as_it_was(tmp_path: Path) -> None:
    run = make(tmp_path)
    run.advance()
    before = weights(run)

    def sample() -> None:
        with run.averaged():
            assert not run.module.training
            raise KeyError

    with pytest.raises(KeyError):
        sample()
    assert run.module.training
    assert all(torch.equal(a, b) for a, b in zip(before, weights(run), strict=True))
