"""Encoded samples: the batches of the pictures that they were exported from; files that cannot be used."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.tiny import TEXT, VAE, write_parts
from tests.unit.training.workspace import (
    error_line,
    leftovers,
    metrics,
    run,
    run_config,
    settings,
    weights,
    write_config,
    write_edits,
    write_images,
)
from training.assemble import build_objective, prepare
from training.config import Data, Dataset
from training.data.folder import scan
from training.data.latents import latent_cell
from training.data.sample import DataError
from training.objectives.flow_matching import FlowMatchingObjective
from training.stop import StopFlag
from training.trajectories.cli import main as make_trajectories

STEPS = range(6)


def objective(folder: Path, **sections: Any) -> FlowMatchingObjective:
    prepared = prepare(run_config(folder, **sections))
    return build_objective(prepared, torch.device("cpu"), StopFlag())


def export(made: FlowMatchingObjective, folder: Path) -> Path:
    """Every sample as a file, by way of batches of one kind; named so that their order stays."""
    folder.mkdir()
    for numbers in made.groups:
        made.samples = lambda _, numbers=numbers: numbers  # type: ignore[method-assign]
        tensors = made.batch_tensors(0)
        for row, number in enumerate(numbers):
            one = {name: tensor[row].clone() for name, tensor in tensors.items()}
            save_file(one, folder / f"{number:02d}.safetensors")
    del made.samples
    return folder


def assert_equal_steps(found: FlowMatchingObjective, wanted: FlowMatchingObjective) -> None:
    """Data, conditions with dropped captions, and losses, bit for bit."""
    for step in STEPS:
        assert found.batch_keys(step)[0] == wanted.batch_keys(step)[0]
        assert found.samples(step) == wanted.samples(step)
        draws = [made.draw(step, slice(0, 4)) for made in (found, wanted)]
        assert torch.equal(draws[0].clean, draws[1].clean)
        told = [made.conditioning(draw) for made, draw in zip((found, wanted), draws, strict=True)]
        for name in ("context", "context_mask", "pooled"):
            first, second = (getattr(one, name) for one in told)
            assert (first is None) == (second is None)
            assert first is None or torch.equal(first, second), name
        assert told[0].extras.keys() == told[1].extras.keys()
        assert all(torch.equal(part, told[1].extras[name]) for name, part in told[0].extras.items())
        assert torch.equal(found.loss(step, slice(0, 4)), wanted.loss(step, slice(0, 4)))


@pytest.mark.parametrize(
    ("arch", "has_files"),
    [("xut", False), ("flux", False), ("tinyflux", False), ("single_stream", False), ("xut", True)],
)
def test_batches_are_those_of_the_pictures(tmp_path: Path, arch: str, has_files: bool) -> None:
    write_images(tmp_path / "images", 8, [(32, 32), (48, 32)])
    (tmp_path / "images" / "03.txt").write_text("a longer caption than the others", encoding="utf-8")
    encoders = {}
    if has_files:
        write_parts(tmp_path)
        encoders = {"vae": str(tmp_path / VAE), "text": str(tmp_path / TEXT)}
    # a real encoder rounds the empty caption otherwise beside others
    dropout = 0.0 if has_files else 0.5
    sections = {"model": {"arch": arch}, "encoders": encoders, "train": {"cond_dropout": dropout}}
    if has_files:
        sections["model"]["overrides"] = {"ctx_dim": 24}
    wanted = objective(tmp_path, **sections)
    folder = export(wanted, tmp_path / "latents")
    found = objective(tmp_path, **sections, datasets=[{"kind": "latents", "path": str(folder)}])  # type: ignore[arg-type]
    assert [sample.key for sample in found.data.samples] == [f"{n:02d}.safetensors" for n in range(8)]
    assert_equal_steps(found, wanted)


def test_batches_of_exo_with_edits(tmp_path: Path) -> None:
    write_edits(tmp_path / "images")
    sections = {"model": {"arch": "exo"}, "buckets": {"resolution": 64}, "train": {"cond_dropout": 0.5}}
    wanted = objective(tmp_path, **sections)
    folder = export(wanted, tmp_path / "latents")
    found = objective(tmp_path, **sections, datasets=[{"kind": "latents", "path": str(folder)}])  # type: ignore[arg-type]
    with torch.no_grad():
        assert_equal_steps(found, wanted)
    assert {found.data.samples[found.samples(step)[0]].is_edit for step in STEPS} == {True, False}
    for name, message in (("context", "token ids `m 1` for exo, got"), ("grids", "got pixels; export")):
        file = next(p for p in folder.iterdir() if "grids" in load_file(p))
        tensors = load_file(file)
        changed = {**tensors, "context": tensors["context"].float()} if name == "context" else dict(tensors)
        if name == "grids":
            del changed["grids"]
        save_file(changed, file)
        with pytest.raises(DataError, match=message):
            objective(tmp_path, **sections, datasets=[{"kind": "latents", "path": str(folder)}])  # type: ignore[arg-type]
        save_file(tensors, file)


def test_batches_of_trajectories_are_those_of_the_pictures(tmp_path: Path) -> None:
    write_parts(tmp_path)
    write_images(tmp_path / "images", 4)
    vae = str(tmp_path / VAE)
    options = ["--images", str(tmp_path / "images"), "--vae", vae, "--dtype", "float32", "--width", "32"]
    assert make_trajectories([str(tmp_path / "out"), *options, "--height", "32", "--count", "4"]) == 0
    sections = {
        "model": {"overrides": {"ctx_dim": 24}},
        "encoders": {"vae": vae, "text": str(tmp_path / TEXT)},
    }
    wanted = objective(tmp_path, **sections)
    kept = [{"kind": "trajectories", "path": str(tmp_path / "out")}]
    assert_equal_steps(objective(tmp_path, **sections, datasets=kept), wanted)  # type: ignore[arg-type]


def test_a_run_writes_its_first_batch_and_learns_from_it(tmp_path: Path) -> None:
    path = write_config(tmp_path, train={"cond_dropout": 0.5})
    options = settings("logging.export_batch=true", "train.steps=2")
    assert run(path, *options) == 0
    exported = tmp_path / "runs" / "run" / "batch.safetensors"
    batch = load_file(exported)
    assert set(batch) == {"latents", "context", "context_mask", "pooled"}
    assert batch["latents"].shape == (4, 4, 4, 4)
    wanted = objective(tmp_path, train={"cond_dropout": 0.5})
    assert all(torch.equal(tensor, batch[name]) for name, tensor in wanted.batch_tensors(0).items())
    before = exported.stat().st_mtime_ns
    assert run(path, *options) == 0
    assert (exported.stat().st_mtime_ns, leftovers(tmp_path)) == (before, [])

    rows = tmp_path / "rows"
    rows.mkdir()
    for number in range(4):
        save_file(
            {name: tensor[number].clone() for name, tensor in batch.items()}, rows / f"{number}.safetensors"
        )
    again = settings(
        f"datasets=[{{kind: latents, path: '{rows}'}}]", "train.cond_dropout=0.0", "train.steps=1"
    )
    for number, key in enumerate(wanted.batch_keys(0)[1]):
        for ending in (".png", ".txt"):
            picture = (tmp_path / "images" / key).with_suffix(ending)
            (write_images(tmp_path / "some", 0) / f"{number}{ending}").write_bytes(picture.read_bytes())
    few = settings("train.cond_dropout=0.0", "train.steps=1")
    again = settings(f"datasets=[{{kind: latents, path: '{rows}'}}]", *few[1::2])
    same = settings(f"datasets=[{{path: '{tmp_path / 'some'}'}}]", *few[1::2])
    assert run(path, *again, *settings("output.name=latents")) == 0
    assert run(path, *same, *settings("output.name=pictures")) == 0
    runs = [tmp_path / "runs" / name for name in ("latents", "pictures")]
    assert metrics(runs[0]) == metrics(runs[1])
    first, second = (weights(folder / "final" / "model.safetensors") for folder in runs)
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def rows_of(folder: Path, **changes: Tensor | None) -> Path:
    """A folder of a sound file and one with changes."""
    sound = {
        "latents": torch.zeros(4, 4, 6),
        "context": torch.zeros(3, 32),
        "context_mask": torch.tensor([True, True, False]),
        "pooled": torch.zeros(32),
    }
    folder.mkdir(exist_ok=True)
    save_file(sound, folder / "a.safetensors")
    changed = {name: tensor for name, tensor in {**sound, **changes}.items() if tensor is not None}
    save_file(changed, folder / "b.safetensors")
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"latents": None}, "latents must be `c h w`, got none"),
        ({"latents": torch.zeros(4, 4)}, r"latents must be `c h w`, got \[4, 4\]"),
        ({"noise": torch.zeros(1)}, "tensors must be among context, .*, got noise"),
        ({"source_latents": torch.zeros(4, 2, 2)}, r"source_latents must be \[4, 4, 6\] as latents"),
        ({"context": None}, "context must be there.* set data.missing_caption to skip or empty"),
    ],
)
def test_a_file_that_cannot_be_used_is_named_or_left_out(
    tmp_path: Path, changes: dict[str, Tensor | None], message: str
) -> None:
    dataset = Dataset(kind="latents", path=str(rows_of(tmp_path / "rows", **changes)))
    with pytest.raises(DataError, match=rf"b\.safetensors: {message}"):
        scan([dataset], Data())
    samples, rejects = scan([dataset], Data(on_error="skip", missing_caption="skip"))
    assert [(s.key, s.width, s.height) for s in samples] == [("a.safetensors", 48, 32)]
    assert [reject.path.name for reject in rejects] == ["b.safetensors"]


def test_values_and_sizes_are_checked_before_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = rows_of(tmp_path / "rows", latents=torch.full((4, 4, 6), torch.nan))
    path = write_config(tmp_path, datasets=[{"kind": "latents", "path": str(rows)}])  # type: ignore[arg-type]
    assert run(path) == 2
    assert "b.safetensors: latents of the sample must be finite, got others" in error_line(capsys)
    rows_of(rows, latents=torch.zeros(16, 4, 6))
    assert run(path) == 2
    assert "b.safetensors must hold latents of encoders.vae with 4 channels, got 16" in error_line(capsys)
    rows_of(rows, context=torch.zeros(3, 8))
    assert run(path) == 2
    assert "b.safetensors must hold context as encoders.text gives it, width" in error_line(capsys)
    (rows / "b.safetensors").write_bytes(b"not a file of tensors")
    assert run(path) == 2
    assert "b.safetensors: file must be safetensors, got" in error_line(capsys)
    empty = tmp_path / "empty"
    empty.mkdir()
    assert run(path, *settings(f"datasets.0.path={empty}")) == 2
    assert f"datasets.0.path: {empty} must be a folder of *.safetensors, found none" in error_line(capsys)
    for task in ("language", "rewrite"):
        assert run(path, *settings("model.arch=exo", f"train.exo.task={task}")) == 2
        message = f"train.exo must not learn task {task} with a dataset of kind latents"
        assert message in error_line(capsys)


def test_cells_of_the_known_spaces() -> None:
    assert [latent_cell(channels) for channels in (4, 16, 64, 128)] == [8, 8, 8, 16]
