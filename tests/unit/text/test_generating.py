"""Pictures of every architecture with its own text encoders, in Python and on the command line."""

from dataclasses import replace
from pathlib import Path

import pytest
from torch.testing import assert_close

from flowcore.__main__ import main
from flowcore.errors import ConfigError
from flowcore.images import read_settings
from flowcore.models import find_architecture
from flowcore.pipeline import Pipeline
from flowcore.settings import Settings
from flowcore.text.t5gemma2 import build_network
from flowcore.weights.checkpoint import save_model
from tests import tiny
from tests.unit.text.small import T5GEMMA2_CONFIG, randomise, write_folders, write_t5gemma2

SETTINGS = Settings(width=64, height=64, num_steps=2)
CHANGES = {
    "flux": {"context_in_dim": 32, "vec_in_dim": 64, "pooled_from_text": False},
    "tinyflux": {"joint_attention_dim": 32, "pooled_projection_dim": 64, "pooled_from_text": False},
    "single_stream": {"text_embed_dim": 24, "in_channels": 4},
}
LENGTHS = {"flux": 256, "tinyflux": 128, "single_stream": 32}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, an autoencoder, and text encoders."""
    folder = tmp_path_factory.mktemp("parts")
    tiny.write_parts(folder)
    write_folders(folder)
    (folder / "t5gemma2").mkdir()
    write_t5gemma2(randomise(build_network(T5GEMMA2_CONFIG, source="test"), 0), folder / "t5gemma2")
    for name, changes in CHANGES.items():
        row = find_architecture(name)
        config = replace(row.presets["tiny"], **changes)
        model = randomise(row.model(config), 2)
        save_model(folder / f"{name}.safetensors", model.state_dict(), architecture=row, config=config)
    return folder


def encoders(folder: Path, name: str) -> list[str]:
    """The text encoders of an architecture."""
    return [str(folder / part) for part in (("t5gemma2",) if name == "single_stream" else ("t5", "clip"))]


def pipeline(folder: Path, name: str) -> Pipeline:
    """An architecture's pipeline."""
    return Pipeline.from_files(
        folder / f"{name}.safetensors",
        vae=folder / tiny.VAE,
        text_encoder=encoders(folder, name),
        device="cpu",
    )


@pytest.mark.parametrize("name", CHANGES)
def test_a_prompt_decides_the_picture_and_companions_do_not(folder: Path, name: str) -> None:
    made = pipeline(folder, name)
    both = made.sample(["a bee", "red cab"], [1, 1], SETTINGS)
    apart = float((both[0] - both[1]).abs().max())
    assert apart > 1e-4 * float(both.std())
    for prompt, latents in zip(("a bee", "red cab"), both, strict=True):
        assert_close(latents, made.sample([prompt], [1], SETTINGS)[0], atol=0.02 * apart, rtol=0)
    told = made.condition(["a bee"], SETTINGS)
    assert told.context is not None
    assert told.context.shape[1] == LENGTHS[name]
    assert (told.pooled is None) == (name == "single_stream")


def test_models_say_which_encoders_they_need(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"must come with a CLIP text model of width 64 .*; pass both"):
        Pipeline.from_files(
            folder / "tinyflux.safetensors", vae=folder / tiny.VAE, text_encoder=folder / "t5", device="cpu"
        )


def test_several_encoders_on_the_command_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.png"
    words = ["a bee", "--model", str(folder / "tinyflux.safetensors"), "--vae", str(folder / tiny.VAE)]
    size = [
        "--width",
        "64",
        "--height",
        "64",
        "--steps",
        "1",
        "--out",
        str(out),
        "--quiet",
        "--device",
        "cpu",
    ]
    assert main([*words, "--text-encoder", *encoders(folder, "tinyflux"), *size]) == 0
    assert read_settings(out)["text_encoder"] == encoders(folder, "tinyflux")
    assert main([*words, "--text-encoder", str(folder / "t5"), *size]) == 2
    assert "must come with a CLIP text model of width 64" in capsys.readouterr().err
