"""The demo's parts in a few steps: what each run writes, and what the second run of the autoencoder keeps."""

import json
from itertools import chain
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from training import demo

FEW = ("--set", "train.steps=2", "--set", "train.batch_size=2", "--set", "sampling.every_steps=2")


@pytest.fixture
def few_scenes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw a few scenes only."""
    monkeypatch.setattr(demo, "TRAIN_COUNT", 8)
    monkeypatch.setattr(demo, "EDIT_COUNT", 8)
    monkeypatch.setattr(demo, "HELD_OUT_COUNT", 4)


@pytest.mark.usefixtures("few_scenes")
def test_second_run_of_the_autoencoder_changes_the_decoder_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from training import demo_parts

    path = tmp_path / "scenes-vae" / "model.safetensors"
    first: dict[str, torch.Tensor] = {}
    facts: list[dict[str, str]] = []
    refine = demo_parts._refine_decoder

    def watched(*arguments: object) -> bool:
        first.update(load_file(path))
        with safe_open(path, "pt") as file:
            facts.append(file.metadata())
        return refine(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(demo_parts, "_refine_decoder", watched)
    assert demo.main(["vae", "--out", str(tmp_path), *FEW]) == 0

    last = load_file(path)
    changed = {name for name in last if not torch.equal(last[name], first[name])}
    assert changed
    assert all(name.startswith("decoder.") for name in changed)
    with safe_open(path, "pt") as file:
        assert file.metadata() == facts[0]
    before = path.read_bytes()
    assert demo.main(["vae", "--out", str(tmp_path), *FEW]) == 0  # both runs are done
    assert path.read_bytes() == before


@pytest.mark.usefixtures("few_scenes")
def test_text_encoder_is_written_with_its_tokenizer(tmp_path: Path) -> None:
    from flowcore.text.gemma3 import load_text_encoder

    assert demo.main(["text", "--out", str(tmp_path), *FEW]) == 0
    encoder = load_text_encoder(str(tmp_path / "scenes-text" / "model.safetensors"))
    coded = encoder.encode(["a red circle left of a blue square"])
    assert coded.context is not None
    assert coded.context.shape == (1, 9, encoder.width)


@pytest.mark.usefixtures("few_scenes")
def test_exo_learns_from_scenes_and_edits_in_its_stages(tmp_path: Path) -> None:
    from training.state import read_checkpoint

    tiny = ("model.preset=tiny", "train.batch_size=2", "sampling.every_steps=0", "checkpoint.every_steps=1")
    short = [(f"train.stages.{n}.steps=1", f"train.stages.{n}.train.batch_size=2") for n in range(9)]
    changes = [part for key in (*tiny, *chain(*short)) for part in ("--set", key)]
    assert demo.main(["model", "--arch", "exo", "--out", str(tmp_path), *changes]) == 0
    assert len(list((tmp_path / "scenes" / "edits").glob("*.source.png"))) == 8
    assert read_checkpoint(tmp_path / "exo" / "checkpoints" / "step-00000009").facts["stage"] == 8
    with safe_open(tmp_path / "exo-demo" / "model.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["flowcore.vae"] == "scenes-vae"
    assert json.loads(metadata["exo.vae"]) == {"family": "tiny", "repo": "scenes-vae", "subfolder": ""}
    assert json.loads(metadata["exo.training"]) == {
        "stage": "masks", "step": 9, "data": ["one", "two", "edits"], "iterations": [1, 4],
    }  # fmt: skip
    assert metadata["flowcore.shift"] == "3.0"
    assert "flowcore.text_encoder" not in metadata
    assert float(metadata["flowcore.train_flops"]) > 1e6


def test_the_words_of_exo_are_those_of_scenes_and_edits() -> None:
    from training.config import RunConfig, load_config
    from training.demo_parts import CONFIGS
    from training.scenes import iterate_edits
    from training.scenes.captions import vocabulary

    words = set(load_config(RunConfig, CONFIGS / "exo_demo.yaml", []).model.overrides["words"])
    spoken = {word for _, text in iterate_edits(400, 1) for word in text.split()}
    assert words == {*vocabulary(), *spoken, "user", "assistant"}


def test_the_minutes_of_a_run_are_shared_among_its_stages(tmp_path: Path) -> None:
    from tests.unit.training.test_loop import Regression
    from tests.unit.training.workspace import run_config
    from training.demo_parts import lengths_within

    stages = [{"steps": 100, "train": {"trainable": ["weight"]}}, {"steps": 300}]
    config = run_config(tmp_path, train={"batch_size": 8, "stages": stages, "steps": 400})
    objective = Regression()
    before = {name: tensor.clone() for name, tensor in objective.module.state_dict().items()}
    first, second = lengths_within(60.0, config, objective)
    assert second == pytest.approx(3 * first, abs=3)
    assert first > 100
    assert all(parameter.requires_grad for parameter in objective.module.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in objective.module.state_dict().items())
