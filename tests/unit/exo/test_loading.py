"""Where an Exo file's other parts are: its autoencoder and its processor."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from flowcore.errors import CheckpointError
from flowcore.exo.loading import TrunkOptions, byte_tokenizer, give_trunk, vae_source
from flowcore.models.exo import PRESETS
from flowcore.weights.exo import load_exo, save_exo
from tests.exo_recomputed import random_exo


def test_the_autoencoder_that_a_file_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    model = tmp_path / "exo.safetensors"
    stated = {"exo.vae": json.dumps({"family": "flux2", "repo": str(tmp_path), "subfolder": "vae"})}
    assert vae_source(None, stated, model) == str(tmp_path / "vae")
    assert vae_source("mine", stated, model) == "mine"
    assert vae_source(None, {**stated, "flowcore.vae": "scenes-vae"}, model) == "scenes-vae"
    (tmp_path / "near.safetensors").touch()
    for name, expected in (
        ("scenes-vae", "scenes-vae"),
        ("near.safetensors", str(tmp_path / "near.safetensors")),
    ):
        assert vae_source(None, {"exo.vae": json.dumps({"repo": name})}, model) == expected
    for text in ("{", "[]", "{}", '{"repo": ""}'):
        with pytest.raises(CheckpointError, match=r"exo\.vae in exo\.safetensors must be JSON with a repo"):
            vae_source(None, {"exo.vae": text}, model)
    with pytest.raises(CheckpointError, match=r"the VAE no/where must be a folder, or a repository .*cache"):
        vae_source(None, {"exo.vae": json.dumps({"repo": "no/where"})}, model)
    with pytest.raises(CheckpointError, match=r"must name its vae in the metadata flowcore\.vae"):
        vae_source(None, {}, model)


def test_a_published_trunk_inside_a_file_needs_its_processor(tmp_path: Path) -> None:
    trunk = {**PRESETS["tiny"].trunk, "image_token_id": 500}
    file = tmp_path / "exo.safetensors"
    save_exo(file, random_exo(trunk=trunk))
    loaded = load_exo(file)
    assert byte_tokenizer(loaded.config) is None
    assert byte_tokenizer(replace(loaded.config, trunk=PRESETS["tiny"].trunk)) is not None
    given = {"options": TrunkOptions(), "device": torch.device("cpu"), "dtype": torch.float32}
    with pytest.raises(CheckpointError, match=r"exo\.safetensors holds a trunk that must come with its proc"):
        give_trunk(loaded, file, trunk=None, **given)
    with pytest.raises(CheckpointError, match=r"must come with its processor, got no tokenizer\.json"):
        give_trunk(loaded, file, trunk=tmp_path, **given)
