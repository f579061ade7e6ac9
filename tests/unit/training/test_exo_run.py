"""Runs of exo: plan, exact continuation, the final file, and its three stages on both kinds of trunk."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from flowcore.weights.exo import fingerprint, load_exo, load_trunk
from tests.exo_trunk import REFERENCE, write_trunk
from tests.support import ROOT
from tests.unit.training.workspace import (
    assert_equal_runs,
    error_line,
    metrics,
    run,
    settings,
    weights,
    write_config,
    write_edits,
)
from training.assemble import prepare_model
from training.config import RunConfig, load_config
from training.export import main as export
from training.state import read_checkpoint

CONFIGS = ROOT / "training" / "configs"
PARTS = ("adapters.", "tokens.", "memory.", "diffusion_head.")


def config_of(folder: Path, **sections: Any) -> Path:
    write_edits(folder / "images")
    model = {"arch": "exo", **sections.pop("model", {})}
    return write_config(folder, model=model, buckets={"resolution": 64}, **sections)


def states(run_folder: Path) -> dict[int, dict[str, Tensor]]:
    """Weights by step."""
    found = [read_checkpoint(path) for path in sorted((run_folder / "checkpoints").iterdir())]
    return {checkpoint.step: checkpoint.tensors("weights") for checkpoint in found}


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    return {name for name in before if not torch.equal(before[name], after[name])}


def test_from_the_plan_to_a_continued_run_and_its_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = config_of(tmp_path, train={"steps": 3}, sampling={"every_steps": 3, "steps": 1})
    assert run(path, "--dry-run", "--json") == 0
    plan = json.loads(capsys.readouterr().out)
    assert run(path) == 0
    stopped = settings("output.name=stopped", "schedule.steps=3")
    assert run(path, *stopped, *settings("train.steps=2")) == 0
    assert run(path, *stopped) == 0
    runs = tmp_path / "runs"
    assert_equal_runs(runs / "stopped", runs / "run")
    assert (runs / "run" / "samples" / "step-00000003.png").exists()

    final = runs / "run" / "final" / "model.safetensors"
    assert plan["trainable_parameters"] == sum(tensor.numel() for tensor in weights(final).values())
    assert plan["memory"]["activations"] > 1e6
    loaded = load_exo(final)
    assert loaded.metadata["exo.format"] == "exo/1"
    assert json.loads(loaded.metadata["exo.trunk"]) == {"kind": "embedded"}
    assert all(torch.equal(t, weights(final)[n]) for n, t in loaded.model.state_dict().items())


def test_words_and_shift_are_in_the_file(tmp_path: Path) -> None:
    path = config_of(
        tmp_path,
        model={"overrides": {"words": ["picture", "1"]}},
        train={"steps": 1, "timesteps": {"law": "uniform", "shift": 3.0}},
    )
    assert run(path) == 0
    loaded = load_exo(tmp_path / "runs" / "run" / "final" / "model.safetensors")
    assert loaded.config.words == ("picture", "1")
    assert loaded.metadata["flowcore.shift"] == "3.0"


def test_edits_are_refused_by_models_that_do_not_see_their_sources(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(config_of(tmp_path, model={"arch": "xut"})) == 2
    assert "datasets must hold no source pictures for xut, which does not see them, got" in error_line(capsys)


def test_checkpoints_and_results_leave_a_trunk_by_reference_out(tmp_path: Path) -> None:
    trunk = write_trunk(tmp_path / "trunk")
    path = config_of(
        tmp_path,
        model={"overrides": {**REFERENCE, "lora_rank": 2}},
        encoders={"text": str(trunk)},
        train={"steps": 2},
        checkpoint={"every_steps": 1},
    )
    assert run(path) == 0
    runs = tmp_path / "runs"
    assert run(path, *settings("output.name=stopped", "train.steps=1", "schedule.steps=2")) == 0
    assert run(path, *settings("output.name=stopped", "schedule.steps=2")) == 0
    assert_equal_runs(runs / "stopped", runs / "run")
    final = runs / "run" / "final" / "model.safetensors"
    assert not any(name.startswith("trunk.") for name in [*states(runs / "run")[2], *weights(final)])
    with safe_open(final, "pt") as file:
        metadata = file.metadata()
    reference = json.loads(metadata["exo.trunk"])
    assert (reference["repo"], reference["fingerprint"]) == (str(trunk), fingerprint(load_trunk(trunk)))
    assert json.loads(metadata["exo.lora"]) == {
        "rank": 2, "alpha": 32.0, "dropout": 0.0, "targets": ["q_proj", "k_proj", "v_proj", "o_proj"],
    }  # fmt: skip
    assert load_exo(final).model.trunk is not None


def tiny(folder: Path, name: str, *assignments: str) -> list[str]:
    """Arguments for one of the configurations `<name>_tiny.yaml` on pictures of the folder."""
    if not (folder / "images").exists():
        write_edits(folder / "images")
    plain = ["logging.plots=false", "logging.tensorboard=false", "sampling.every_steps=0"]
    paths = [f"datasets=[{{path: '{folder / 'images'}'}}]", f"output.dir={folder / 'runs'}"]
    return [str(CONFIGS / f"{name}_tiny.yaml"), *settings(*paths, *plain, *assignments)]


def told_training(file: Path) -> dict[str, Any]:
    """What a file says of its training; trained on pixels, it names no autoencoder."""
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    assert "exo.vae" not in metadata
    return dict(json.loads(metadata["exo.training"]))


def test_the_stages_change_what_the_recipe_says_and_no_bit_besides(tmp_path: Path) -> None:
    trunk = write_trunk(tmp_path / "trunk")
    reference = [
        f"model.overrides={json.dumps({**REFERENCE, 'lora_rank': 2})}",
        f"encoders.text={trunk}",
        "checkpoint={every_steps: 1, keep: 99}",
        "logging.every_steps=1",
    ]
    before = load_trunk(trunk).state_dict()
    arguments = tiny(tmp_path, "exo", *reference)
    assert run(Path(arguments[0]), *arguments[1:]) == 0
    final = tmp_path / "runs" / "exo_tiny" / "final" / "model.safetensors"
    assert told_training(final) == {
        "stage": "joint_lora", "step": 9, "data": ["images"], "iterations": [1, 4],
    }  # fmt: skip
    early = tmp_path / "early.safetensors"
    assert export([str(tmp_path / "runs" / "exo_tiny"), str(early), "--step", "3"]) == 0
    assert {**told_training(early), "data": None} == {
        "stage": "projector", "step": 3, "data": None, "iterations": [1, 1],
    }  # fmt: skip
    found = states(tmp_path / "runs" / "exo_tiny")
    facts = {
        step: read_checkpoint(tmp_path / f"runs/exo_tiny/checkpoints/step-{step:08d}").facts for step in found
    }
    ends = [max(step for step in facts if facts[step]["stage"] == stage) for stage in range(3)]
    first, second, third = (changed(found[facts[end]["stage_first_step"] or 1], found[end]) for end in ends)
    names = set(found[1])
    assert first == {name for name in names if name.startswith("projector.")}
    assert second <= {name for name in names if name.startswith((*PARTS, "projector."))}
    assert {name.partition(".")[0] for name in second} >= {"tokens", "memory", "diffusion_head", "projector"}
    assert third <= {name for name in names if name.startswith((*PARTS, "edit_head.", "lora."))}
    assert {name.partition(".")[0] for name in third} >= {"diffusion_head", "edit_head", "lora"}
    lora = {name for name in names if name.startswith("lora.")}
    assert {name for name in lora if "lora_B" in name} <= third
    after = load_trunk(trunk).state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    rates = [float(row[2]) for row in metrics(tmp_path / "runs" / "exo_tiny")[1:]]
    peaks = [max(rates[facts[end]["stage_first_step"] : end]) for end in ends]
    assert peaks == pytest.approx([1e-4, 1e-4, 2e-5])


@pytest.mark.parametrize("name", ["exo_stage1", "exo_stage2", "exo_stage3"])
def test_a_stage_runs_alone(tmp_path: Path, name: str) -> None:
    arguments = tiny(tmp_path, name)
    assert run(Path(arguments[0]), *arguments[1:]) == 0
    assert (tmp_path / "runs" / f"{name}_tiny" / "final" / "ema.safetensors").exists()


@pytest.mark.parametrize("name", ["exo", "exo_stage1", "exo_stage2", "exo_stage3"])
def test_the_recipes_have_the_numbers_of_their_source(name: str) -> None:
    config = load_config(RunConfig, CONFIGS / f"{name}.yaml", ["optimizer.lr_profile=reference"])
    own = load_config(RunConfig, CONFIGS / f"{name}.yaml", [])
    epochs, rates = {"projector": 2, "diffusion_head": 5, "joint_lora": 3}, [1e-4, 5e-6, 1e-6]
    tables = [config.stage(i) for i in range(3)] if name == "exo" else [config]
    tables_own = [own.stage(i) for i in range(3)] if name == "exo" else [own]
    picked = [0, 1, 2] if name == "exo" else [int(name[-1]) - 1]
    if name == "exo":
        assert {stage.name: stage.epochs for stage in config.train.stages} == epochs
    else:
        assert config.train.epochs == list(epochs.values())[picked[0]]
    for place, table, plain in zip(picked, tables, tables_own, strict=True):
        assert table.optimizer.reference_lr == rates[place]
        assert plain.optimizer.lr == [1e-4, 1e-4, 2e-5][place]
        assert plain.optimizer.betas == (0.9, 0.95)
        assert (plain.schedule.name, plain.schedule.minimum, plain.schedule.warmup_share) == (
            "cosine",
            0.1,
            0.05,
        )
        assert plain.train.exo.iterations == [(1, 1), (1, 1), (1, 4)][place]
        assert plain.train.exo.task == ("projector" if place == 0 else "velocity")
    architecture, model_config = prepare_model(own)
    assert architecture.name == "exo"
    assert not model_config.embeds_trunk
