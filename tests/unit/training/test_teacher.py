"""Teachers: whose velocity a run learns, of which samples, and which models cannot be one."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional

from flowcore.errors import ConfigError
from flowcore.pipeline import Pipeline
from flowcore.weights.checkpoint import read_tensors
from tests.tiny import MODEL, VAE, write_parts
from tests.unit.training.workspace import fitted, run, run_config, write_config, write_edits, write_images
from training.assemble import build_objective, prepare
from training.objectives.flow_matching import FlowMatchingObjective
from training.stop import StopFlag

CPU = torch.device("cpu")
BATCH = slice(0, 4)
SIDE = 64


def objective(folder: Path, teachers: list[str], arch: str = "exo", **train: Any) -> FlowMatchingObjective:
    """Of a tiny preset in the latents of the teacher."""
    channels = {"exo": "latent_channels", "xut": "input_dim"}[arch]
    config = run_config(
        folder,
        model={"arch": arch, "overrides": {channels: 4}},
        encoders={"vae": str(folder / VAE)},
        buckets={"resolution": SIDE},
        train={"teachers": teachers, **train},
    )
    return build_objective(prepare(config), CPU, StopFlag())


def halved(path: Path) -> Path:
    """Another model beside one: with half of its weights."""
    tensors, metadata = read_tensors(path)
    other = path.with_name("other.safetensors")
    save_file({name: tensor / 2 for name, tensor in tensors.items()}, other, metadata=dict(metadata))
    return other


def batch_of(made: FlowMatchingObjective, *, is_edit: bool) -> int:
    return next(s for s in range(99) if made.data.samples[made.samples(s)[0]].is_edit == is_edit)


@pytest.mark.parametrize("count", [1, 2])
def test_the_velocity_of_teachers_is_learned_instead_of_the_datas(tmp_path: Path, count: int) -> None:
    write_images(tmp_path / "images", 8, [(SIDE, SIDE)])
    first = write_parts(tmp_path)
    second = halved(first)
    names = [str(path) for path in (first, second)][:count]
    made = objective(tmp_path, names, cond_dropout=0.5)
    draw = made.draw(0, BATCH)
    assert 0 < int(draw.dropped.sum()) < 4
    velocities = []
    for name in names:
        pipeline = Pipeline.from_files(name)
        told = pipeline.condition(draw.captions, pipeline.settings_type(width=SIDE, height=SIDE))
        null = pipeline.model.architecture.null_text(told)
        assert told.context is not None
        assert null.context is not None
        for row in draw.dropped.nonzero()[:, 0].tolist():
            told.context[row] = null.context[row]
        with torch.no_grad():
            velocities.append(pipeline.velocity(draw.sample.noised, draw.sigma, told))
    expected = sum(velocities) / count
    torch.testing.assert_close(made.target(draw), expected)
    assert not torch.allclose(made.target(draw), draw.sample.velocity, atol=0.1)
    with torch.no_grad():
        predicted = made.predict(draw, made.conditioning(draw))
        wanted = 0.9 * functional.mse_loss(predicted, expected)
    parts = {"edit": 0.0, "perceptual": 0.0}
    alone = objective(tmp_path, names, cond_dropout=0.5, exo=parts)
    assert float(alone.loss(0, BATCH).detach()) == pytest.approx(float(wanted), rel=1e-4)


def test_edits_are_learned_from_the_data(tmp_path: Path) -> None:
    write_edits(tmp_path / "images")
    made = objective(tmp_path, [str(write_parts(tmp_path))])
    edits, plain = (made.draw(batch_of(made, is_edit=told), BATCH) for told in (True, False))
    assert torch.equal(made.target(edits), edits.sample.velocity)
    assert not torch.equal(made.target(plain), plain.sample.velocity)


def test_a_run_learns_what_its_teacher_knows(tmp_path: Path) -> None:
    teacher = str(write_parts(tmp_path))
    write_images(tmp_path / "images", 8, [(SIDE, SIDE)])
    made = objective(tmp_path, [teacher], "xut", cond_dropout=0.0)
    losses = fitted(made, 60, 2)
    assert sum(losses[-4:]) < 0.6 * sum(losses[:4])


def test_a_file_names_the_teachers_of_its_run(tmp_path: Path) -> None:
    teacher = str(write_parts(tmp_path))
    write_images(tmp_path / "images", 4, [(SIDE, SIDE)])
    stages = [{"name": "alone", "steps": 1}, {"name": "taught", "steps": 1, "train": {"teachers": [teacher]}}]
    path = write_config(
        tmp_path,
        model={"arch": "xut", "overrides": {"input_dim": 4}},
        encoders={"vae": str(tmp_path / VAE)},
        train={"steps": 2, "stages": stages},
    )
    assert run(path) == 0
    _, metadata = read_tensors(tmp_path / "runs" / "run" / "final" / "model.safetensors")
    assert json.loads(metadata["flowcore.teachers"]) == [teacher]


@pytest.mark.parametrize(
    ("teacher", "vae", "what"),
    [
        ("exo-demo", "scenes-vae", r"must be a model that captions alone tell, got exo-demo \(exo\)"),
        (
            "xut-demo",
            None,
            r"must have the latents of encoders\.vae \(tiny\), got xut-demo with others \(scenes-vae\)",
        ),
    ],
)
def test_models_that_cannot_teach(tmp_path: Path, teacher: str, vae: str | None, what: str) -> None:
    write_images(tmp_path / "images", 8, [(SIDE, SIDE)])
    write_parts(tmp_path)
    config = run_config(
        tmp_path,
        model={"arch": "xut", "overrides": {"input_dim": 16 if vae else 4}},
        encoders={"vae": vae or str(tmp_path / VAE)},
        train={"teachers": [teacher]},
    )
    with pytest.raises(ConfigError, match=rf"train\.teachers {what}"):
        build_objective(prepare(config), CPU, StopFlag())


def test_a_missing_teacher_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_config(tmp_path, train={"teachers": [str(tmp_path / MODEL)]})
    assert run(path) == 2
    assert "error: train.teachers: weights must be an existing file" in capsys.readouterr().err
