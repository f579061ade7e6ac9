"""The demo's parts in a few steps: what each run writes, and what the second run of the autoencoder keeps."""

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
