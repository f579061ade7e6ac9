"""What Exo files say of their autoencoder and training, and what follows when they say nothing."""

import json
import warnings
from dataclasses import replace
from pathlib import Path

import pytest

from flowcore.errors import CheckpointError, FlowCoreWarning
from flowcore.exo import ExoPipeline, ExoSettings
from flowcore.exo.facts import describe_training, describe_vae, stated_vae, trained_iterations
from flowcore.inspection import describe_file
from tests import tiny_exo

TRAINING = describe_training(stage="joint", step=7, data=["scenes"], iterations=(1, 2))


@pytest.mark.parametrize(
    ("space", "family"),
    [("flux2", "flux2"), ("flux1", "flux1"), ("flux1-unshifted", "flux1"), ("scenes-vae", "tiny")],
)
def test_the_family_of_an_autoencoder(space: str, family: str) -> None:
    stated = describe_vae(space, "a/b", "vae")
    assert json.loads(stated) == {"family": family, "repo": "a/b", "subfolder": "vae"}
    assert stated_vae({"exo.vae": stated}, "x") == ("a/b", "vae")


def test_inspect_shows_them_and_the_autoencoder_is_found(tmp_path: Path) -> None:
    stated = {"exo.vae": describe_vae("tiny16", tiny_exo.VAE), "exo.training": TRAINING}
    named = tiny_exo.write_parts(tmp_path, **stated)
    metadata = describe_file(named)["metadata"]
    assert metadata["exo.vae"] == {"family": "tiny", "repo": tiny_exo.VAE, "subfolder": ""}
    assert metadata["exo.training"] == {
        "stage": "joint", "step": 7, "data": ["scenes"], "iterations": [1, 2],
    }  # fmt: skip
    alone = tiny_exo.write_parts(tmp_path, names_vae=False, **stated)
    assert "flowcore.vae" not in describe_file(alone)["metadata"]
    pipeline = ExoPipeline.from_pretrained(alone, device="cpu")
    assert pipeline.sources["vae"] == str(tmp_path / tiny_exo.VAE)


def test_a_warning_beyond_the_trained_iterations(tmp_path: Path) -> None:
    old = ExoPipeline.from_pretrained(tiny_exo.write_parts(tmp_path), device="cpu")
    settings = ExoSettings(num_steps=1, width=32, height=32, iterations=4, cfg_scale=1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        old.refine(["a"], [0], settings)
    with pytest.warns(FlowCoreWarning, match="iterations should be at most 4, as in the training of") as seen:
        old.refine(["a"], [0], replace(settings, iterations=5))
    assert "\n" not in str(seen[0].message)
    assert seen[0].filename == __file__
    new = tiny_exo.write_parts(tmp_path, **{"exo.training": TRAINING})
    with pytest.warns(FlowCoreWarning, match=r"at most 2, as in the training of exo\.safetensors, got 4;"):
        ExoPipeline.from_pretrained(new, device="cpu").refine(["a"], [0], settings)


@pytest.mark.parametrize("text", ["{", "[]", '{"iterations": 3}', '{"iterations": ["a", 2]}'])
def test_a_training_that_cannot_be_read(text: str) -> None:
    with pytest.raises(CheckpointError, match=r"exo\.training in a\.safetensors must be JSON with iter"):
        trained_iterations({"exo.training": text}, "a.safetensors")
    assert trained_iterations({}, "a.safetensors") == (1, 4)
    assert trained_iterations({"exo.training": "{}"}, "a.safetensors") == (1, 4)
