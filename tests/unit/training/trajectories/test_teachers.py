"""Teachers: what is stored is what the stored noise leads to, and models train on it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import Flux2KleinPipeline, FluxPipeline
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from flowcore.exo import ExoSettings
from flowcore.images import image_to_tensor
from flowcore.pipeline import Pipeline, Settings
from flowcore.vae.autoencoder import load_vae
from tests import tiny_exo
from tests.support import assert_close
from tests.tiny import SPEC, VAE, write_parts
from tests.unit.training.trajectories.pipelines import write_flux1, write_klein
from tests.unit.training.workspace import (
    error_line,
    metrics,
    run,
    run_config,
    write_config,
    write_images,
)
from training.assemble import build_objective, prepare
from training.data.trajectories import draw_start
from training.objectives.exo import ExoObjective
from training.stop import StopFlag
from training.trajectories.captions import few_captions, read_prompts
from training.trajectories.cli import main
from training.trajectories.diffusers_teacher import network_flops

PROMPTS = ["a bee", "red cab", "a red bee"]
SIZE = ["--width", "32", "--height", "16", "--steps", "2"]


@pytest.fixture(scope="module")
def flux1(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_flux1(tmp_path_factory.mktemp("flux1"))


@pytest.fixture(scope="module")
def klein(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_klein(tmp_path_factory.mktemp("klein"))


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_parts(tmp_path_factory.mktemp("parts"))


def make(folder: Path, *arguments: str) -> int:
    """Exit code of a command over the three prompts."""
    (folder / "prompts.txt").write_text("a bee\n\nred  cab\na red bee\n", encoding="utf-8")
    prompts = [] if "--images" in arguments else ["--prompts", str(folder / "prompts.txt")]
    return main([str(folder / "out"), *prompts, *arguments])


def records(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]], list[Tensor]]:
    """Header, facts and latents of what a command wrote."""
    header, *lines = map(json.loads, (folder / "out" / "index.jsonl").read_text("utf-8").splitlines())
    return header, lines, [load_file(folder / "out" / line["shard"])[line["key"] + ".z0"] for line in lines]


def test_flux1_latents_are_those_of_the_pipeline_from_the_same_noise(flux1: Path, tmp_path: Path) -> None:
    options = ["--dtype", "float32", "--guidance", "3"]
    assert make(tmp_path, "--teacher", str(flux1), "--count", "3", *SIZE, *options) == 0
    header, lines, latents = records(tmp_path)
    assert header["latents"] == {
        "space": "custom", "channels": 4, "downscale": 2, "mean": [0.1] * 4, "std": [2.0] * 4,
    }  # fmt: skip
    assert (header["guidance"], header["schedule"]["shift"]) == (3.0, 3.0)
    pipeline = FluxPipeline.from_pretrained(flux1)
    noise = torch.stack([draw_start(line["noise_seed"], line["noise_shape"]) for line in lines])
    assert noise.shape == (3, 4, 8, 16)
    packed = pipeline._pack_latents(noise, 3, 4, 8, 16)
    made = pipeline(
        prompt=PROMPTS, width=32, height=16, num_inference_steps=2, guidance_scale=3.0, latents=packed,
        output_type="latent",
    ).images  # fmt: skip
    expected = pipeline._unpack_latents(made, 16, 32, pipeline.vae_scale_factor)
    assert_close(torch.stack(latents), expected, limit=1e-5)
    assert not torch.allclose(latents[0], noise[0], atol=0.1)


def test_klein_latents_are_packed_and_normalised(klein: Path, tmp_path: Path) -> None:
    assert make(tmp_path, "--teacher", str(klein), "--count", "2", *SIZE, "--dtype", "float32") == 0
    _, lines, latents = records(tmp_path)
    pipeline = Flux2KleinPipeline.from_pretrained(klein)
    noise = torch.stack([draw_start(line["noise_seed"], line["noise_shape"]) for line in lines])
    assert noise.shape == (2, 16, 4, 8)
    raw = pipeline(
        prompt=PROMPTS[:2], width=32, height=16, num_inference_steps=2, latents=noise, output_type="latent"
    ).images
    bn = pipeline.vae.bn
    spread = (bn.running_var + pipeline.vae.config.batch_norm_eps).sqrt()
    normalised = (pipeline._patchify_latents(raw) - bn.running_mean[:, None, None]) / spread[:, None, None]
    assert_close(torch.stack(latents), normalised, limit=1e-5)


def test_a_model_of_the_project_is_a_teacher(parts: Path, tmp_path: Path) -> None:
    arguments = ["--teacher", str(parts), "--count", "3", "--steps", "3", "--batch", "3", "--guidance", "1.5"]
    assert make(tmp_path, *arguments, "--negative", "blue", "--dtype", "float32") == 0
    header, lines, latents = records(tmp_path)
    assert (header["size"], header["negative"], header["coupling"]) == ([32, 24], "blue", "teacher")
    settings = Settings(num_steps=3, cfg_scale=1.5, negative_prompt="blue")
    seeds = [line["noise_seed"] for line in lines]
    assert torch.equal(torch.stack(latents), Pipeline.from_files(parts).sample(PROMPTS, seeds, settings))


def test_an_exo_is_a_teacher(tmp_path: Path) -> None:
    file = tiny_exo.write_parts(tmp_path)
    assert make(tmp_path, "--teacher", str(file), "--count", "2", "--steps", "2", "--dtype", "float32") == 0
    header, lines, latents = records(tmp_path)
    assert (header["guidance"], header["schedule"]) == (4.0, "euler, shift 3.0")
    settings = ExoSettings(num_steps=2)
    seeds = [line["noise_seed"] for line in lines]
    expected = Pipeline.from_files(file).sample(PROMPTS[:2], seeds, settings)
    assert torch.equal(torch.stack(latents), expected)


def test_latents_of_another_autoencoder_belong_to_no_noise(parts: Path, flux1: Path, tmp_path: Path) -> None:
    vae = parts.parent / VAE
    assert make(tmp_path, "--teacher", str(flux1), "--count", "2", *SIZE, "--vae", str(vae)) == 0
    header, lines, latents = records(tmp_path)
    assert (header["coupling"], header["latents"]["mean"]) == ("independent", list(SPEC.mean))
    assert "noise_seed" not in lines[0]
    assert [tuple(each.shape) for each in latents] == [(4, 2, 4)] * 2


def test_images_are_encoded(parts: Path, tmp_path: Path) -> None:
    images, vae = write_images(tmp_path / "images", 3), parts.parent / VAE
    options = ["--images", str(images), "--vae", str(vae), "--width", "32", "--height", "32"]
    assert make(tmp_path, *options, "--dtype", "float32") == 0
    header, lines, latents = records(tmp_path)
    assert [line["caption"] for line in lines] == ["picture 0", "picture 1", "picture 2"]
    assert header["coupling"] == "independent"
    pixels = image_to_tensor(Image.open(images / "01.png"), 32, 32)
    assert_close(latents[1], load_vae(vae).encode(pixels)[0], limit=1e-5)


def test_a_model_trains_on_trajectories(
    flux1: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert make(tmp_path, "--teacher", str(flux1), "--count", "4", *SIZE) == 0
    capsys.readouterr()
    dataset = {"kind": "trajectories", "path": str(tmp_path / "out")}
    path = write_config(tmp_path, datasets=[dataset], logging={"data_order": True})
    assert run(path, "--dry-run", "--json") == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["buckets"] == [{"width": 32, "height": 16, "images": 4}]
    assert run(path) == 0
    rows = metrics(tmp_path / "runs" / "run")
    assert len(rows) == 5
    order = (tmp_path / "runs" / "run" / "data_order.csv").read_text().splitlines()[1]
    assert sorted(order.rpartition(",")[2].split(";")) == [f"{number:06d}" for number in range(4)]


def test_an_exo_trains_on_what_an_exo_made(tmp_path: Path) -> None:
    file = tiny_exo.write_parts(tmp_path)
    assert make(tmp_path, "--teacher", str(file), "--count", "4", "--steps", "1", "--guidance", "1") == 0
    dataset = {"kind": "trajectories", "path": str(tmp_path / "out")}
    path = write_config(
        tmp_path,
        model={"arch": "exo"},
        datasets=[dataset],
        encoders={"vae": str(tmp_path / tiny_exo.VAE)},
        train={"steps": 2, "exo": {"iterations": [1, 2], "perceptual": 0.0}},
    )
    assert run(path) == 0
    assert len(metrics(tmp_path / "runs" / "run")) == 3


def test_an_exo_learns_edits_from_composites(tmp_path: Path) -> None:
    file = tiny_exo.write_parts(tmp_path)
    size = ("--width", "64", "--height", "64")
    assert make(tmp_path, "--teacher", str(file), "--count", "3", "--steps", "1", *size) == 0
    sections: dict[str, Any] = {
        "model": {"arch": "exo"},
        "datasets": [{"kind": "trajectories", "path": str(tmp_path / "out"), "edits": True}],
        "encoders": {"vae": str(tmp_path / tiny_exo.VAE)},
        "train": {"steps": 4, "batch_size": 3, "exo": {"iterations": [1, 1]}},
    }
    made = build_objective(prepare(run_config(tmp_path, **sections)), torch.device("cpu"), StopFlag())
    assert isinstance(made, ExoObjective)
    assert [sample.key for sample in made.data.samples][3:] == [f"{n:06d}.edit" for n in range(3)]
    for number in range(3):
        sample = made.data.samples[3 + number]
        assert sample.is_edit
        assert sample.caption == PROMPTS[number]
        clean, plain, other = (made.data.latents([n])[0] for n in (3 + number, number, (number + 1) % 3))
        source = made.data.source_latents([3 + number])[0]
        assert torch.equal(clean, plain)
        changed = (source != clean).any(dim=0)
        rows, columns = changed.any(dim=1).nonzero()[:, 0], changed.any(dim=0).nonzero()[:, 0]
        inside = (slice(None), slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1))
        assert 0 < changed.float().mean() < 0.6
        assert torch.equal(source[inside], other[inside])
        assert changed[inside[1:]].all()
        assert all(int(side[0]) % 2 == 0 and len(side) % 2 == 0 for side in (rows, columns))
    pictures = made._sources([3, 4])
    assert pictures is not None
    for picture, number in zip(pictures, (3, 4), strict=True):
        decoded = made.image_encoder.decode(made.data.source_latents([number]))[0]
        assert torch.equal(picture, decoded.clamp(-1, 1))
    path = write_config(tmp_path, **sections)
    assert run(path) == 0
    assert len(metrics(tmp_path / "runs" / "run")) == 5


@pytest.mark.parametrize("kind", ["klein", "project"])
def test_an_exo_learns_edits_that_refine_what_fewer_steps_made(
    kind: str, klein: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, size = tiny_exo.write_parts(tmp_path), ["--width", "64", "--height", "64"]
    teacher = [str(klein), "--vae", str(tmp_path / tiny_exo.VAE)] if kind == "klein" else [str(file)]
    options = ["--count", "3", "--steps", "2", "--source-steps", "1", "--dtype", "float32", *size]
    assert make(tmp_path, "--teacher", *teacher, *options) == 0
    header, lines, latents = records(tmp_path)
    assert header["sources"] == {"steps": 1, "captions": None}
    found = load_file(tmp_path / "out" / lines[0]["shard"])
    sources = torch.stack([found[line["key"] + ".source_z0"] for line in lines])
    assert not torch.allclose(sources, torch.stack(latents), atol=1e-3)
    if kind == "project":
        seeds, settings = (
            [line["noise_seed"] for line in lines],
            ExoSettings(num_steps=1, width=64, height=64),
        )
        assert torch.equal(sources, Pipeline.from_files(file).sample(PROMPTS, seeds, settings))
    path = write_config(
        tmp_path,
        model={"arch": "exo"},
        datasets=[{"kind": "trajectories", "path": str(tmp_path / "out"), "edits": True}],
        encoders={"vae": str(tmp_path / tiny_exo.VAE)},
        train={"steps": 4, "batch_size": 3, "exo": {"iterations": [1, 1]}},
    )
    capsys.readouterr()
    assert run(path) == 0
    assert len(metrics(tmp_path / "runs" / "run")) == 5


def test_sources_of_other_captions_have_the_noise_of_the_record(parts: Path, tmp_path: Path) -> None:
    (tmp_path / "before.txt").write_text("a cab\nred bee\na bee\n", encoding="utf-8")
    options = ["--count", "3", "--steps", "2", "--guidance", "1", "--dtype", "float32", "--batch", "3"]
    before = ["--source-prompts", str(tmp_path / "before.txt")]
    assert make(tmp_path, "--teacher", str(parts), *options, *before) == 0
    _, lines, _ = records(tmp_path)
    assert [line["source_caption"] for line in lines] == ["a cab", "red bee", "a bee"]
    found = load_file(tmp_path / "out" / lines[0]["shard"])
    sources = torch.stack([found[line["key"] + ".source_z0"] for line in lines])
    settings, seeds = Settings(num_steps=2, cfg_scale=1.0), [line["noise_seed"] for line in lines]
    expected = Pipeline.from_files(parts).sample(["a cab", "red bee", "a bee"], seeds, settings)
    assert torch.equal(sources, expected)


def test_composites_need_two_records_and_trajectories(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tiny_exo.write_parts(tmp_path)
    assert make(tmp_path, "--teacher", str(file), "--count", "1", "--steps", "1") == 0
    dataset = {"kind": "trajectories", "path": str(tmp_path / "out"), "edits": True}
    capsys.readouterr()
    assert run(write_config(tmp_path, datasets=[dataset])) == 2
    assert "edits must have shards of two records or more" in error_line(capsys)
    assert run(write_config(tmp_path, datasets=[{**dataset, "kind": "folder"}])) == 2
    assert "edits must be false for kind folder, got true; set kind: trajectories" in error_line(capsys)


def test_training_on_latents_of_another_space_is_refused(
    flux1: Path, parts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert make(tmp_path, "--teacher", str(flux1), "--count", "2", *SIZE) == 0
    capsys.readouterr()
    dataset = {"kind": "trajectories", "path": str(tmp_path / "out")}
    path = write_config(tmp_path, datasets=[dataset], encoders={"vae": str(parts.parent / VAE)})
    assert run(path) == 2
    assert "must hold latents of encoders.vae, tiny with 4 channels, got custom" in error_line(capsys)
    (tmp_path / "out" / "index.jsonl").write_text("{}\n")
    assert run(path) == 2
    assert "must hold the index.jsonl of training.trajectories" in error_line(capsys)


def test_a_dry_run_counts_without_weights(
    flux1: Path, klein: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in [*(flux1 / "transformer").glob("*.safetensors")]:
        path.rename(path.with_suffix(".aside"))
    try:
        plans = {}
        for folder, guidance in ((flux1, "4"), (klein, "4"), (klein, "1")):
            options = ["--teacher", str(folder), "--guidance", guidance, *SIZE, "--dry-run", "--json"]
            assert make(tmp_path, *options) == 0
            plans[folder, guidance] = json.loads(capsys.readouterr().out)
    finally:
        for path in [*(flux1 / "transformer").glob("*.aside")]:
            path.rename(path.with_suffix(".safetensors"))
    assert not (tmp_path / "out").exists()
    first = plans[flux1, "4"]
    assert (first["records"], first["captions"], first["latents"]) == (25000, 3, [4, 8, 16])
    assert (first["record_bytes"], first["shards"]) == (4 * 8 * 16 * 2, 98)
    assert first["hours"] == pytest.approx(25000 * first["record_flops"] / 150e12 / 3600)
    settings = json.loads((flux1 / "transformer" / "config.json").read_text())
    assert first["record_flops"] == 2 * network_flops("FluxPipeline", settings, (8, 16)) > 1e6
    assert plans[klein, "4"]["record_flops"] == 2 * plans[klein, "1"]["record_flops"]


def test_few_captions_are_warned_of(parts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert make(tmp_path, "--teacher", str(parts), "--count", "76", "--dry-run") == 0
    assert "warning: 3 distinct captions serve 76 records; give at least 4" in capsys.readouterr().err
    assert few_captions(["a", "b", "c"], 75) is None
    built_in = read_prompts(None)
    assert len(set(built_in)) == len(built_in) == 1200
    assert few_captions(built_in, 25_000) is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--teacher", "FLUX", "--count", "0"], "--count must be above 0, got 0"),
        (["--teacher", "FLUX", "--seed", "-1"], "--seed must be 0 or more, got -1"),
        (["--teacher", "FLUX", "--width", "30"], "--width must be a multiple of 4 for"),
        (["--teacher", "FLUX", "--negative", "x"], "--negative must be left out for a FluxPipeline"),
        (["--teacher", "nothing"], "weights must be an existing file or folder or a bundled name"),
        (["--teacher", "hub:x"], "--teacher must be hub:OWNER/NAME"),
        (["--teacher", "FLUX", "--json"], "--json must come with --dry-run"),
        (["--images", "x"], "--images must come with --vae"),
        (["--images", "x", "--vae", "v", "--source-steps", "1"], "--images must come without --source-steps"),
        (["--teacher", "FLUX", "--source-steps", "0"], "--source-steps must be above 0, got 0"),
        (
            ["--teacher", "FLUX", *SIZE, "--source-steps", "2"],
            "--source-steps must be below --steps 2, got 2",
        ),
        (["--teacher", "FLUX", *SIZE, "--source-prompts", "ONE"], "as the file of --prompts, 3, got 1 in"),
    ],
)
def test_wrong_options_are_one_line(
    arguments: list[str], message: str, flux1: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {"FLUX": flux1, "ONE": tmp_path / "one.txt"}
    files["ONE"].write_text("a bee\n", encoding="utf-8")
    assert make(tmp_path, *(str(files.get(part, part)) for part in arguments)) == 2
    assert message in error_line(capsys)
    assert not (tmp_path / "out").exists()


def test_another_pipeline_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    assert make(tmp_path, "--teacher", str(tmp_path)) == 2
    assert "must be a FluxPipeline, Flux2Pipeline or Flux2KleinPipeline, got a StableDiffusion" in error_line(
        capsys
    )
