"""Encoders from the hub: only where asked for, only the files that are needed, from a stand-in for it."""

import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from huggingface_hub.utils import filter_repo_objects

from flowcore.errors import CheckpointError
from flowcore.hub import find_folder
from flowcore.text.loading import load_text_encoder
from tests import tiny
from tests.unit.text.small import PROMPTS, write_folders

FILES = {
    "model.safetensors",
    "pytorch_model.bin",
    "config.json",
    "tokenizer.json",
    "README.md",
    "transformer/model.safetensors",
    "text_encoder_2/model.safetensors",
    "text_encoder_2/config.json",
    "tokenizer_2/tokenizer.json",
    "tokenizer/vocab.json",
}


class Hub:
    """Notes what is asked of it and answers with a local folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.asked: list[str] = []
        self.wanted: set[str] = set()
        self.options: dict[str, Any] = {}

    def snapshot_download(self, repo: str, **options: Any) -> str:
        self.asked.append(repo)
        self.options = options
        patterns = {name: value for name, value in options.items() if name.endswith("_patterns")}
        self.wanted = set(filter_repo_objects(FILES, **patterns))
        return str(self.folder)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Hub:
    hub = Hub(tmp_path / "snapshot")
    t5, _ = write_folders(tmp_path)
    shutil.copytree(t5, hub.folder)
    shutil.copytree(t5, hub.folder / "text_encoder_2")
    (hub.folder / "tokenizer_2").mkdir()
    (hub.folder / "text_encoder_2" / "tokenizer.json").rename(hub.folder / "tokenizer_2" / "tokenizer.json")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.snapshot_download)
    return hub


def test_an_address_is_downloaded(hub: Hub) -> None:
    loaded = load_text_encoder("hub:google/flan-t5-base")
    assert hub.asked == ["google/flan-t5-base"]
    assert hub.wanted == {"model.safetensors", "config.json", "tokenizer.json"}
    local = load_text_encoder(hub.folder / "model.safetensors")
    assert torch.equal(loaded.encode(PROMPTS).context, local.encode(PROMPTS).context)


def test_a_folder_of_a_repository_comes_with_its_tokenizer(hub: Hub) -> None:
    assert load_text_encoder("hub:some/flux-1/text_encoder_2").width == 32
    assert hub.asked == ["some/flux-1"]
    assert hub.wanted == {
        "text_encoder_2/model.safetensors",
        "text_encoder_2/config.json",
        "tokenizer_2/tokenizer.json",
    }


def test_nothing_else_is_looked_up(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="from the hub, write hub:google/flan-t5-base"):
        load_text_encoder("google/flan-t5-base")
    for wrong in ("hub:flan", "hub:", "hub:a/b/../c d"):
        with pytest.raises(CheckpointError, match="a hub address must be hub:OWNER/NAME"):
            load_text_encoder(wrong)
    from flowcore.parts import text_sources

    metadata = {"flowcore.text_encoder": "hub:some/one"}
    with pytest.raises(CheckpointError, match="must be a local file, got hub:some/one; to download it, pass"):
        text_sources(None, metadata, tmp_path / "model.safetensors")
    assert text_sources(["hub:some/one"], metadata, tmp_path / "model.safetensors") == "hub:some/one"
    assert hub.asked == []


def test_a_hub_out_of_reach_or_without_weights_is_one_line(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    (hub.folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="hub:some/one must hold safetensors files, got none"):
        load_text_encoder("hub:some/one")

    def out_of_reach(_repo: str, **_options: Any) -> str:
        raise LocalEntryNotFoundError("Connection refused\nand more")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", out_of_reach)
    with pytest.raises(
        CheckpointError, match=r"within reach, got .*Connection refused; check name"
    ) as caught:
        load_text_encoder("hub:some/one")
    assert "\n" not in str(caught.value)


def test_a_checkpoint_is_fetched_where_it_may_be(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_folder(hub.folder) == hub.folder
    assert hub.asked == []
    for may_download in (False, True):
        assert find_folder("some/trunk", revision="v1", may_download=may_download) == hub.folder
        assert hub.options == {"revision": "v1", "local_files_only": not may_download}
    assert hub.wanted == FILES

    def absent(_repo: str, **_options: Any) -> str:
        raise LocalEntryNotFoundError("Not in the cache\nand more")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", absent)
    expected = r"the VAE some/vae must be a folder, or .* \(Not in the cache\); pass a VAE's folder"
    with pytest.raises(CheckpointError, match=expected) as caught:
        find_folder("some/vae", what="VAE")
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("hub")
def test_a_model_of_another_width_says_so(tmp_path: Path) -> None:
    from flowcore.pipeline import Pipeline

    model = tiny.write_parts(tmp_path)
    with pytest.raises(
        ValueError, match=r"must give tokens of the model's width 24, got 32 \(hub:some/one\)"
    ):
        Pipeline.from_files(model, text_encoder="hub:some/one", device="cpu")
