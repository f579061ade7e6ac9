"""T5Gemma2 text encoder: 128 states for every prompt; the padding side; published layouts; faulty files."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from transformers import GemmaTokenizer

from flowcore.errors import CheckpointError, ConfigError
from flowcore.text.loading import load_text_encoder
from flowcore.text.t5gemma2 import (
    T5Gemma2TextEncoder,
    build_network,
    network_from_tensors,
    save_text_encoder,
    text_states,
)
from flowcore.text.tokens import SPECIAL_TOKENS
from tests.unit.text.small import T5GEMMA2_CONFIG, T5GEMMA2_TEXT, gemma_tokenizer, randomise, write_t5gemma2

pytest.importorskip("transformers.models.t5gemma2", reason="needs transformers 5")

PROMPTS = ["a bee", "", "cab"]
TOLERANCE = 1e-5  # padding changes the order of float32 sums; states are of size 1


@pytest.fixture(scope="module")
def network() -> nn.Module:
    return randomise(build_network(T5GEMMA2_CONFIG, source="test"), 0)


@pytest.fixture
def folder(network: nn.Module, tmp_path: Path) -> Path:
    """A folder as transformers writes it."""
    write_t5gemma2(network, tmp_path)
    return tmp_path


def states(encoder: T5Gemma2TextEncoder, prompts: list[str]) -> torch.Tensor:
    context = encoder.encode(prompts).context
    assert context is not None
    return context


def test_tokens_are_those_of_transformers(folder: Path) -> None:
    reference = GemmaTokenizer.from_pretrained(folder)
    prompts = [*PROMPTS, "a" * 300, "a bee é"]
    for side in ("left", "right"):
        reference.padding_side = side
        expected = reference(
            prompts, max_length=128, padding="max_length", truncation=True, return_tensors="pt"
        )
        ids, mask = load_text_encoder(folder, padding_side=side).tokenize(prompts)
        assert torch.equal(ids, expected["input_ids"])
        assert torch.equal(mask.long(), expected["attention_mask"])


def test_side_is_the_tokenizers_unless_told(folder: Path, tmp_path: Path) -> None:
    assert load_text_encoder(folder).padding_side == "left"  # of Gemma's tokenizers
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "padding_side": "right"}))
    right = load_text_encoder(folder)
    assert right.padding_side == "right"
    assert load_text_encoder(folder, padding_side="left").padding_side == "left"
    (folder / "tokenizer_config.json").unlink()
    assert load_text_encoder(folder).padding_side == "left"
    save_text_encoder(tmp_path / "one.safetensors", right)
    assert load_text_encoder(tmp_path / "one.safetensors").padding_side == "right"


def test_every_prompt_has_128_states_of_its_own(folder: Path) -> None:
    encoder = load_text_encoder(folder)
    together = states(encoder, PROMPTS)
    assert together.shape == (3, 128, 24)
    assert encoder.encode(PROMPTS).context_mask is None
    for prompt, own in zip(PROMPTS, together, strict=True):
        assert_close(own, states(encoder, [prompt])[0], atol=TOLERANCE, rtol=0)
    assert together.abs().sum(dim=2).min() > 0  # padding has states, too
    assert not torch.allclose(together[0], together[2], atol=1e-2)


def test_states_of_the_text_do_not_depend_on_the_side(folder: Path) -> None:
    left, right = (
        states(load_text_encoder(folder, padding_side=side), ["a bee"]) for side in ("left", "right")
    )
    assert_close(left[:, -6:], right[:, :6], atol=TOLERANCE, rtol=0)
    assert not torch.allclose(left[:, :6], right[:, :6], atol=1e-2)


def test_the_empty_text_has_states(folder: Path) -> None:
    assert states(load_text_encoder(folder), [""]).any()  # no text at all is zeros, by the model's own row


@pytest.mark.parametrize(
    "prefix",
    ["", "encoder.", "text_model.", "encoder.text_model.", "model.encoder.", "model.encoder.text_model."],
)
def test_every_layout_gives_the_same_network(network: nn.Module, prefix: str) -> None:
    state = {prefix + name: tensor for name, tensor in network.state_dict().items()}
    loaded = network_from_tensors(T5GEMMA2_CONFIG, state, source="test").eval()
    ids = torch.tensor([[2, 6, 7, 0]])
    mask = torch.tensor([[True, True, True, False]])
    with torch.no_grad():
        assert torch.equal(text_states(loaded, ids, mask), text_states(network, ids, mask))


def test_one_file_holds_everything(folder: Path, tmp_path: Path) -> None:
    encoder = load_text_encoder(folder)
    save_text_encoder(tmp_path / "one.safetensors", encoder)
    loaded = load_text_encoder(tmp_path / "one.safetensors")
    assert torch.equal(states(loaded, PROMPTS), states(encoder, PROMPTS))
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    assert loaded.width == 24


def test_scale_of_embeddings_is_rounded_with_the_weights(network: nn.Module) -> None:
    halves = {name: tensor.bfloat16() for name, tensor in network.state_dict().items()}
    loaded = network_from_tensors(T5GEMMA2_CONFIG, halves, source="test")
    embedding: Any = loaded.get_submodule("embed_tokens")
    ids = torch.tensor([[5]])
    scale = torch.tensor(24**0.5).bfloat16()
    assert torch.equal(embedding(ids)[0, 0], halves["embed_tokens.weight"][5] * scale)


def test_unknown_parts_are_named(folder: Path) -> None:
    assert load_text_encoder(folder).unknown_words("a zoo") == ["zoo"]


def test_wrong_arguments_are_named(folder: Path) -> None:
    encoder = load_text_encoder(folder)
    with pytest.raises(ConfigError, match="must be one of sequence, got 'pooled'"):
        encoder.encode(["a"], "pooled")
    with pytest.raises(ConfigError, match="prompts must be at least one, got none"):
        encoder.encode([])
    with pytest.raises(ConfigError, match="must be a list of texts, got one text 'a'"):
        encoder.encode("a")
    with pytest.raises(ConfigError, match="padding_side must be left or right, got 'middle'"):
        load_text_encoder(folder, padding_side="middle")


def test_faulty_files_are_named(folder: Path, network: nn.Module) -> None:
    (folder / "config.json").write_text('{"model_type": "gemma3"}', encoding="utf-8")
    with pytest.raises(ConfigError, match=r"the model_type of .* must be one of t5gemma2, .*, got gemma3"):
        load_text_encoder(folder)
    (folder / "config.json").write_text('{"model_type": "t5gemma2", "encoder": {}}', encoding="utf-8")
    with pytest.raises(ConfigError, match="must have a text_config"):
        load_text_encoder(folder)
    (folder / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(CheckpointError, match="must be JSON"):
        load_text_encoder(folder)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"must come with config\.json"):
        load_text_encoder(folder)
    state = network.state_dict()
    del state["norm.weight"]
    with pytest.raises(CheckpointError, match=r"1 missing \(norm\.weight\)"):
        network_from_tensors(T5GEMMA2_CONFIG, state, source="test")
    with pytest.raises(CheckpointError, match=r"must hold a T5Gemma2 encoder, .*\(other\)"):
        network_from_tensors(T5GEMMA2_CONFIG, {"other": torch.zeros(1)}, source="test")
    with pytest.raises(ConfigError, match="settings of test must fit T5Gemma2"):
        build_network({**T5GEMMA2_TEXT, "model_type": "t5gemma2_text", "hidden_size": 25}, source="test")


def test_special_tokens_are_gemmas() -> None:
    assert set(SPECIAL_TOKENS["Gemma"].values()) <= set(gemma_tokenizer().get_vocab())
