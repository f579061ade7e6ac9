"""`training.sequences`: runs, resumes, scores; the tasks that come with it, and pairs from a file."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from flowcore.errors import ConfigError
from flowcore.flux import load_transport, transport
from tests.unit.training.workspace import error_line, settings
from training.config import load_config
from training.keys import generator
from training.sequences.cli import BUNDLED, CONFIGS, main
from training.sequences.config import SequenceConfig
from training.sequences.run import missed, prepare
from training.sequences.tasks import FIT_COUNT, draw_curves, draw_rings, measure_map, measure_rings

QUICK = (
    "train.batch_size=4",
    "checkpoint.every_steps=2",
    "sampling.every_steps=2",
    "sampling.steps=2",
    "scoring.count=8",
    "logging.tensorboard=false",
    "logging.plots=false",
    "logging.every_steps=1",
)
PARAMETERS = {"curves": 261_602, "rings": 211_986}
"""Of the reference runs (flux.md 7.5)."""


def run(task: str, folder: Path, *assignments: str) -> int:
    places = (f"output.dir={folder}", *QUICK, *assignments)
    return main([task, *settings(*places)])


def config_of(task: str, *assignments: str) -> SequenceConfig:
    return load_config(SequenceConfig, CONFIGS / f"{task}.yaml", list(assignments))


@pytest.mark.parametrize("task", BUNDLED)
def test_the_command_runs_scores_and_says_what_is_missed(
    task: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(task, tmp_path, "train.steps=2") == 1  # nobody learns this in two steps
    lines = capsys.readouterr().out.splitlines()
    scores = json.loads((tmp_path / task / "score.json").read_text(encoding="utf-8"))
    limits = config_of(task).scoring.limits
    assert [line.split()[0] for line in lines] == list(scores)
    assert "must be at most" in lines[0]
    assert set(limits) == set(scores)
    assert json.loads((tmp_path / task / "samples" / "step-00000002.json").read_text(encoding="utf-8"))


def test_limits_that_are_met_are_exit_code_0_and_a_finished_run_is_scored_again(tmp_path: Path) -> None:
    met = ("train.steps=2", "scoring.limits={relative_rmse: [0, 100]}")
    assert run("curves", tmp_path, *met) == 0
    stamp = (tmp_path / "curves" / "final" / "model.safetensors").stat().st_mtime_ns
    assert run("curves", tmp_path, *met) == 0
    assert (tmp_path / "curves" / "final" / "model.safetensors").stat().st_mtime_ns == stamp


def test_a_continued_run_ends_like_one_left_alone(tmp_path: Path) -> None:
    for name, parts in (("whole", (4,)), ("parts", (2, 4))):
        for steps in parts:
            # One curve of learning rates for both, whatever the number of steps.
            changes = (f"train.steps={steps}", f"output.name={name}", "schedule.steps=4", "ema.decay=0.9")
            run("rings", tmp_path, *changes, "schedule.warmup_steps=0")
    for file in ("model", "ema"):
        whole, parts_ = (
            load_file(tmp_path / n / "final" / f"{file}.safetensors") for n in ("whole", "parts")
        )
        assert all(torch.equal(whole[key], parts_[key]) for key in whole)
    scores = [(tmp_path / name / "score.json").read_text(encoding="utf-8") for name in ("whole", "parts")]
    assert scores[0] == scores[1]


def test_micro_batches_change_nothing(tmp_path: Path) -> None:
    for name, micro in (("whole", 4), ("parts", 2)):
        changes = ("train.steps=1", f"output.name={name}", f"train.micro_batch_size={micro}")
        run("curves", tmp_path, *changes, "train.cond_dropout=0.5", "schedule.warmup_steps=0")
    whole, parts = (load_file(tmp_path / n / "final/model.safetensors") for n in ("whole", "parts"))
    for key, tensor in whole.items():
        torch.testing.assert_close(parts[key], tensor, rtol=0, atol=2e-5)


def test_the_model_of_a_run_is_used_from_plain_python(tmp_path: Path) -> None:
    run("curves", tmp_path, "train.steps=1")
    trained = load_transport(tmp_path / "curves" / "final" / "model.safetensors")
    pairs = draw_curves(3, generator(5, "test"))
    made = transport(trained.model, pairs.condition, space=trained.spaces, steps=2)
    assert made.shape == pairs.data.shape


@pytest.mark.parametrize("task", BUNDLED)
def test_the_tasks_have_the_models_of_the_reference_runs(task: str) -> None:
    prepared = prepare(config_of(task, "scoring.count=8"))
    from flowcore.models.flux import Flux

    model = Flux(prepared.model_config, device="meta")
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[task]


def test_curves_have_the_spread_and_the_coefficients_of_the_formula() -> None:
    prepared = prepare(config_of("curves", "scoring.count=8"))
    assert prepared.pairs.known.data.std() == pytest.approx(1.0, abs=0.02)
    condition = prepared.spaces.condition
    assert max(map(abs, condition.mean)) < 0.05
    assert condition.std == pytest.approx([1.0] * 4, abs=0.05)
    assert len(prepared.pairs.known.data) == FIT_COUNT


def test_measurements_of_perfect_samples_are_those_of_the_data() -> None:
    rings, curves = draw_rings(4096, generator(0, "a")), draw_curves(2048, generator(0, "b"))
    measured = measure_rings(rings.data, rings)
    assert measured["radius_error"] == pytest.approx(0.05 * math.sqrt(2 / math.pi), abs=1e-3)
    assert measured["resultant"] == pytest.approx(0.225, abs=5e-3)
    measured = measure_map(curves.data, curves)
    assert measured["relative_rmse"] == 0
    assert measured["shuffled"] == pytest.approx(math.sqrt(2), abs=0.03)


def test_no_batch_is_drawn_twice_and_none_is_held_out() -> None:
    pairs = prepare(config_of("rings", "scoring.count=64")).pairs
    first, second = pairs.batch(0), pairs.batch(1)
    assert torch.equal(first.data, pairs.batch(0).data)
    assert not torch.equal(first.data, second.data)
    assert pairs.keys(1)[0] == "64"


@pytest.mark.parametrize("kind", ["safetensors", "npz"])
def test_pairs_from_a_file_with_a_source_to_start_from(kind: str, tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    series = draw.normal(size=(40, 6, 1)).astype(np.float32)
    arrays = {"condition": draw.integers(0, 3, (40, 2)), "data": series, "source": series * 2}
    path = tmp_path / f"pairs.{kind}"
    if kind == "npz":
        np.savez(path, **arrays)
    else:
        save_file({name: torch.from_numpy(array) for name, array in arrays.items()}, path)
    config = tmp_path / "own.yaml"
    config.write_text(
        f"output: {{name: own}}\ntask: {path}\nsource: paired\n"
        "condition: {kind: symbols, size: 3, count: 2}\ndata: {kind: series, window: 2, count: 6}\n"
        "model: {overrides: {axes_dim: [8, 4, 4]}}\ntrain: {steps: 2, batch_size: 4}\n",
        encoding="utf-8",
    )
    assert run(str(config), tmp_path) == 0
    pairs = prepare(load_config(SequenceConfig, config, [])).pairs
    assert (len(pairs.known.data), len(pairs.held_out.data)) == (32, 8)
    assert pairs.held_out.source is not None
    assert set(json.loads((tmp_path / "own" / "score.json").read_text(encoding="utf-8"))) == {
        "relative_rmse",
        "shuffled",
    }


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("task=loops", "task must be one of curves, rings or a .safetensors or .npz file, got 'loops'"),
        ("task=none.npz", "none.npz"),
        ("source=paired", "source must be noise for the task curves, got paired"),
        ("data.count=12", "points space must have shape b 12 2, got"),
        ("model.preset=huge", "model.preset must be one of tiny"),
        ("model.overrides={in_channels: 3}", "model.overrides must leave in_channels to the spaces"),
        ("model.overrides={num_heads: 5}", "model.overrides: hidden_size must be a multiple"),
        ("model.overrides={axes_dim: [8, 4, 4]}", "axes_dim must have 2 entries for these spaces"),
        ("scoring.limits={radius_error: [0, 1]}", "must name relative_rmse, shuffled, got radius_error"),
        ("train.timesteps.shift=3", "train.timesteps must be left out of a sequence run; set times"),
        ("sampling.prompts=[a]", "sampling.prompts must be left out of a sequence run"),
    ],
)
def test_a_bad_setting_is_one_line(
    assignment: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("curves", tmp_path, assignment) in (1, 2)
    assert message in error_line(capsys)
    assert not (tmp_path / "curves").exists()


def test_files_of_few_or_unequal_rows_are_refused(tmp_path: Path) -> None:
    from training.sequences.tasks import read_pairs

    path = tmp_path / "pairs.safetensors"
    save_file({"condition": torch.zeros(20, 1, 1), "data": torch.zeros(19, 1, 1)}, path)
    with pytest.raises(ConfigError, match="must hold as many rows of each, 10 or more"):
        read_pairs(path, is_paired=False)
    save_file({"condition": torch.zeros(20, 1, 1)}, path)
    with pytest.raises(ConfigError, match="must hold condition, data, got no data"):
        read_pairs(path, is_paired=False)


def test_a_missed_limit_is_named_and_a_number_that_is_none_misses_every_limit() -> None:
    limits = {"a": (None, 0.1), "b": (1.2, None)}
    assert missed({"a": 0.05, "b": 1.4}, limits) == {}
    assert missed({"a": 0.2, "b": 1.0}, limits) == {"a": "must be at most 0.1", "b": "must be at least 1.2"}
    assert set(missed({"a": math.nan, "b": math.nan}, limits)) == {"a", "b"}


@pytest.mark.slow
@pytest.mark.parametrize("task", BUNDLED)
def test_the_tasks_are_learned_to_their_limits(task: str, tmp_path: Path) -> None:
    """Takes about 150 CPU seconds for the curves, 45 for the rings."""
    quiet = ("logging.tensorboard=false", "logging.plots=false")
    assert main([task, *settings(f"output.dir={tmp_path}", *quiet)]) == 0
    if task == "curves":
        early = json.loads((tmp_path / task / "samples" / "step-00000300.json").read_text(encoding="utf-8"))
        assert early["relative_rmse"] < 0.45
