"""Every architecture goes through plan, run, stop, exact continuation, final file and sampling."""

import json
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from flowcore.flow import sigma_grid
from flowcore.flow.solvers import euler
from flowcore.models import ARCHITECTURES, Architecture, find_architecture
from flowcore.pipeline import Pipeline, Settings
from tests.tiny import CONFIG, TEXT, VAE, write_parts
from tests.unit.text.small import write_folders
from tests.unit.training.workspace import (
    assert_equal_runs,
    run,
    run_config,
    settings,
    weights,
    write_config,
    write_images,
)
from training.assemble import build_objective, prepare
from training.config import Model
from training.keys import generator
from training.stop import StopFlag

CPU = torch.device("cpu")
TRAINED = [row for row in ARCHITECTURES if row.name != "exo"]  # which reads token ids: see test_exo_run.py
EVERY = pytest.mark.parametrize("row", TRAINED, ids=lambda row: row.name)
TEXT_WIDTHS = {
    "xut": ("ctx_dim",),
    "flux": ("context_in_dim", "vec_in_dim"),
    "tinyflux": ("joint_attention_dim", "pooled_projection_dim"),
    "single_stream": ("text_embed_dim",),
}
CHANNELS = {"single_stream": {"in_channels": 4}}
PROMPTS = ["a red circle", "a blue square on a green circle"]


def test_the_configuration_knows_every_architecture() -> None:
    assert set(get_args(Model.model_fields["arch"].annotation)) == {row.name for row in ARCHITECTURES}


def sections(row: Architecture, folder: Path) -> dict[str, Any]:
    """A run of the tiny preset on the autoencoder and the text encoder of `write_parts`."""
    write_parts(folder)
    widths = dict.fromkeys(TEXT_WIDTHS[row.name], CONFIG.ctx_dim)
    return {
        "model": {"arch": row.name, "overrides": {**widths, **CHANNELS.get(row.name, {})}},
        "encoders": {"vae": str(folder / VAE), "text": str(folder / TEXT)},
        "train": {"steps": 4, "cond_dropout": 0.4},
        "optimizer": {"lr": 0.01},
        "schedule": {"name": "constant"},
        "sampling": {"steps": 2, "cfg": 2.0},
    }


@EVERY
def test_from_the_plan_to_a_continued_run_and_its_pictures(
    row: Architecture, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = sections(row, tmp_path)
    path = write_config(tmp_path, **asked)
    assert run(path, "--dry-run", "--json") == 0
    plan = json.loads(capsys.readouterr().out)
    assert run(path) == 0
    stopped = settings("output.name=stopped")
    assert run(path, *stopped, *settings("train.steps=2")) == 0
    assert run(path, *stopped) == 0
    runs = tmp_path / "runs"
    assert_equal_runs(runs / "stopped", runs / "run")

    final = runs / "run" / "final" / "model.safetensors"
    assert plan["arch"] == row.name
    assert plan["trainable_parameters"] == sum(tensor.numel() for tensor in weights(final).values())
    trained = build_objective(
        prepare(run_config(tmp_path, **{**asked, "model": {**asked["model"], "weights": str(final)}})),
        CPU,
        StopFlag(),
    )
    with torch.no_grad():
        expected = trained.sample(PROMPTS, StopFlag())
    pipeline = Pipeline.from_files(final)
    noise = torch.stack([torch.randn(4, 4, 4, generator=generator(0, "preview", i)) for i in range(2)])
    with torch.no_grad():
        velocity = pipeline.guided_velocity(PROMPTS, Settings(cfg_scale=2.0))
        found = pipeline.vae.decode(euler(velocity, noise, sigma_grid(2)))
        told = pipeline.guided_velocity(PROMPTS, Settings(cfg_scale=2.0, negative_prompt="green"))
        level = torch.full((2,), 0.7)
        assert not torch.allclose(told(noise, level), velocity(noise, level), atol=1e-4)
    assert pipeline.default_size == (32, 32)
    assert (expected - expected.mean()).abs().max() > 0.01
    assert torch.allclose(found, expected, atol=1e-4)


def test_a_model_that_reads_two_encoders(tmp_path: Path) -> None:
    """Token states of a T5 and the vector of a CLIP; the model's file names both."""
    row = find_architecture("tinyflux")
    asked = sections(row, tmp_path)
    texts = [str(path) for path in write_folders(tmp_path)]
    widths = {"joint_attention_dim": 32, "pooled_projection_dim": 64, "pooled_from_text": False}
    path = write_config(
        tmp_path,
        **{
            **asked,
            "model": {"arch": row.name, "overrides": widths},
            "encoders": {"vae": str(tmp_path / VAE), "text": texts},
            "train": {"steps": 1, "cond_dropout": 0.4},
        },
    )
    assert run(path) == 0
    pipeline = Pipeline.from_files(tmp_path / "runs" / "run" / "final" / "model.safetensors")
    assert pipeline.sources["text_encoder"] == texts
    assert (pipeline.text_encoder.width, pipeline.text_encoder.pooled_width) == (32, 64)


@EVERY
def test_the_tiny_preset_needs_no_files(row: Architecture, tmp_path: Path) -> None:
    path = write_config(tmp_path, model={"arch": row.name}, train={"steps": 1})
    assert run(path) == 0


@EVERY
def test_the_loss_of_a_dropped_caption_is_that_of_no_caption(row: Architecture, tmp_path: Path) -> None:
    write_images(tmp_path / "images")
    losses = []
    for rate in (0.0, 1.0):
        made = build_objective(
            prepare(run_config(tmp_path, model={"arch": row.name}, train={"cond_dropout": rate})),
            CPU,
            StopFlag(),
        )
        with torch.no_grad():
            for number, parameter in enumerate(made.module.parameters()):
                noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
                parameter.add_(0.1 * noise)
            told = made.loss(0, slice(0, 4))
            texts = made.data.conditioning
            made.data.conditioning = lambda numbers, _, texts=texts: row.null_text(
                texts(numbers, [True] * len(numbers))
            )  # type: ignore[method-assign]
            losses.append((float(told), float(made.loss(0, slice(0, 4)))))
    (told, null), (dropped, same) = losses
    assert dropped == same == pytest.approx(null, rel=1e-5)
    assert abs(told - dropped) > 1e-6
