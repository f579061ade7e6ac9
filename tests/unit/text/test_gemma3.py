"""Gemma-3 text encoder: each prompt's result is its own; the recipe; its files; files that do not fit."""

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close

from flowcore.errors import CheckpointError, ConfigError
from flowcore.text.encoder import TextMode
from flowcore.text.gemma3 import (
    Gemma3TextEncoder,
    build_text_model,
    load_text_encoder,
    save_text_encoder,
    text_states,
)
from flowcore.text.word_tokenizer import build_word_tokenizer

COLORS, SHAPES = ["red", "green", "blue", "gray"], ["circle", "square", "star"]
WORDS = ["a", "and", "large", "left", "of", "on", "right", "small", *COLORS, *SHAPES]
CONFIG: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_hidden_layers": 7,  # six with a sliding window, one global
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 12,
    "query_pre_attn_scalar": 12,
    "sliding_window": 8,
}
PROMPTS = [
    "a red circle",
    "",
    "a small green star left of a large blue square on gray and a red circle right of a star",
    "blue square on gray",
    "elephant",
]
# Padding changes the order of float32 sums; states are of size 1.
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def encoder() -> Gemma3TextEncoder:
    torch.manual_seed(0)
    return Gemma3TextEncoder(build_text_model(CONFIG), build_word_tokenizer(WORDS))


def rows(encoder: Gemma3TextEncoder, prompts: list[str], mode: TextMode) -> list[Tensor]:
    """Each prompt's own states, without padding."""
    conditioning = encoder.encode(prompts, mode)
    context, mask = conditioning.context, conditioning.context_mask
    assert context is not None
    if mask is None:
        return list(context)
    return [states[keep] for states, keep in zip(context, mask, strict=True)]


@pytest.mark.parametrize("mode", ["sequence", "pooled"])
def test_result_does_not_depend_on_companions_or_their_order(
    encoder: Gemma3TextEncoder, mode: TextMode
) -> None:
    alone = {prompt: rows(encoder, [prompt], mode)[0] for prompt in PROMPTS}
    for order in (PROMPTS, PROMPTS[::-1], [*PROMPTS[2:], PROMPTS[0], PROMPTS[0]], PROMPTS[1:3]):
        for prompt, states in zip(order, rows(encoder, order, mode), strict=True):
            assert_close(states, alone[prompt], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("mode", ["sequence", "pooled"])
def test_different_prompts_differ_at_every_place_of_a_batch(
    encoder: Gemma3TextEncoder, mode: TextMode
) -> None:
    for first, second in (("a red circle", "a blue circle"), ("a red circle", "a red star")):
        ours, theirs = rows(encoder, [first, second], mode)
        assert float((ours - theirs).abs().max()) > 1e-2
        swapped = rows(encoder, [second, first], mode)
        assert_close(swapped[1], ours, atol=TOLERANCE, rtol=0)


def test_pooled_is_the_normalised_mean_with_bos(encoder: Gemma3TextEncoder) -> None:
    states = rows(encoder, PROMPTS, "sequence")
    for own, pooled in zip(states, rows(encoder, PROMPTS, "pooled"), strict=True):
        mean = own.mean(0)
        assert_close(pooled, (mean / mean.norm().clamp_min(1e-8))[None])


def test_sequence_has_the_mask_and_zero_padding(encoder: Gemma3TextEncoder) -> None:
    conditioning = encoder.encode(PROMPTS)
    assert conditioning.context is not None
    assert conditioning.context_mask is not None
    assert conditioning.context.shape == (5, 21, 24)
    assert conditioning.context_mask.sum(1).tolist() == [4, 1, 21, 5, 2]
    assert not conditioning.context[~conditioning.context_mask].any()


def test_tokens_are_bos_and_text_padded_right(encoder: Gemma3TextEncoder) -> None:
    ids, mask = encoder.tokenize(["red circle", ""])
    red, circle = (4 + sorted(WORDS).index(word) for word in ("red", "circle"))
    assert ids.tolist() == [[2, red, circle], [2, 0, 0]]
    assert mask.tolist() == [[True, True, True], [True, False, False]]


def test_long_prompts_are_cut_to_128_tokens(encoder: Gemma3TextEncoder) -> None:
    long = " ".join(["red"] * 300)
    assert encoder.tokenize([long])[0].shape == (1, 128)
    same = " ".join(["red"] * 127)
    assert_close(rows(encoder, [long], "sequence"), rows(encoder, [same], "sequence"))


def test_sliding_window_is_applied(encoder: Gemma3TextEncoder) -> None:
    wide = build_text_model({**CONFIG, "sliding_window": 64}).requires_grad_(False)
    wide.load_state_dict(encoder.model.state_dict())
    ids, mask = encoder.tokenize([PROMPTS[2]])
    near, far = (text_states(model, ids, mask)[0] for model in (encoder.model, wide))
    assert_close(near[:8], far[:8], atol=TOLERANCE, rtol=0)
    assert float((near[8:] - far[8:]).abs().max()) > 1e-3


def test_half_precision_leaves_the_rotary_tables_alone(encoder: Gemma3TextEncoder) -> None:
    half = deepcopy(encoder).to(dtype=torch.bfloat16)
    assert half.model.embed_tokens.weight.dtype == torch.bfloat16
    tables = {name: table for name, table in half.model.named_buffers() if "inv_freq" in name}
    assert tables
    for name, table in encoder.model.named_buffers():
        assert name not in tables or torch.equal(tables[name], table)


def test_word_tokenizer_has_gemmas_special_tokens() -> None:
    tokenizer = build_word_tokenizer(["Red", "blue", "red"])
    assert tokenizer.convert_ids_to_tokens(range(6)) == ["<pad>", "<eos>", "<bos>", "<unk>", "blue", "red"]
    assert tokenizer("RED, green-blue", add_special_tokens=False)["input_ids"] == [5, 3, 3, 3, 4]


def test_unknown_words_are_named(encoder: Gemma3TextEncoder) -> None:
    assert encoder.unknown_words("a red Elephant on gray grass") == ["Elephant", "grass"]


def test_one_file_holds_network_settings_and_tokenizer(encoder: Gemma3TextEncoder, tmp_path: Path) -> None:
    path = tmp_path / "te.safetensors"
    save_text_encoder(path, encoder.model, encoder.tokenizer)
    loaded = load_text_encoder(path)
    modes: tuple[TextMode, ...] = ("sequence", "pooled")
    for mode in modes:
        assert_close(rows(loaded, PROMPTS, mode), rows(encoder, PROMPTS, mode), atol=0, rtol=0)
    assert loaded.width == 24
    assert [entry.name for entry in tmp_path.iterdir()] == ["te.safetensors"]
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())


@pytest.mark.parametrize(
    ("prefix", "extra", "kind"),
    [
        ("", None, "gemma3_text"),
        ("model.", "lm_head.weight", "gemma3_text"),
        ("language_model.model.", "language_model.lm_head.weight", "gemma3"),
        ("model.language_model.", "model.vision_tower.embeddings.weight", "gemma3"),
    ],
)
def test_hugging_face_folder(
    prefix: str, extra: str | None, kind: str, encoder: Gemma3TextEncoder, tmp_path: Path
) -> None:
    state = {prefix + key: tensor for key, tensor in encoder.model.state_dict().items()}
    if extra:
        state[extra] = torch.zeros(2, 2)
    save_file(state, tmp_path / "model.safetensors")
    text_config = {**CONFIG, "model_type": "gemma3_text"}
    config = text_config if kind == "gemma3_text" else {"model_type": kind, "text_config": text_config}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (tmp_path / "tokenizer.json").write_text(encoder.tokenizer.backend_tokenizer.to_str(), encoding="utf-8")
    for path in (tmp_path, tmp_path / "model.safetensors"):
        loaded = load_text_encoder(path)
        assert_close(rows(loaded, PROMPTS, "pooled"), rows(encoder, PROMPTS, "pooled"), atol=0, rtol=0)


def test_settings_and_tokenizer_must_come_with_the_weights(
    encoder: Gemma3TextEncoder, tmp_path: Path
) -> None:
    path = tmp_path / "te.safetensors"
    save_file(encoder.model.state_dict(), path)
    with pytest.raises(CheckpointError, match=r"te\.safetensors must come with tokenizer\.json, got none"):
        load_text_encoder(path)
    (tmp_path / "tokenizer.json").write_text("{}", encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"te\.safetensors must come with config\.json, got none"):
        load_text_encoder(path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    with pytest.raises(ConfigError, match="must be one of gemma3_text, gemma3, got llama"):
        load_text_encoder(path)
    (tmp_path / "config.json").write_text(
        json.dumps({**CONFIG, "model_type": "gemma3_text"}), encoding="utf-8"
    )
    with pytest.raises(CheckpointError, match=r"the tokenizer of te\.safetensors must be a tokenizer\.json"):
        load_text_encoder(path)


def test_missing_and_unexpected_tensors_are_named(encoder: Gemma3TextEncoder, tmp_path: Path) -> None:
    path = tmp_path / "te.safetensors"
    save_text_encoder(path, encoder.model, encoder.tokenizer)
    state = load_file(path)
    state["stray.weight"] = state.pop("norm.weight")
    metadata = {"flowcore.config": json.dumps({**CONFIG, "model_type": "gemma3_text"})}
    save_file(state, path, metadata=metadata)
    with pytest.raises(CheckpointError, match=r"1 missing \(norm\.weight\); 1 unexpected \(stray\.weight\)"):
        load_text_encoder(path)
    save_file({"other": torch.zeros(1), "tokenizer_json": state["tokenizer_json"]}, path, metadata=metadata)
    with pytest.raises(
        CheckpointError, match=r"must hold a T5Gemma2 encoder, Gemma-3 text model, .*\(other\)"
    ):
        load_text_encoder(path)


def test_a_name_is_never_looked_up_on_the_network() -> None:
    with pytest.raises(CheckpointError, match="existing file or folder or a bundled name"):
        load_text_encoder("google/gemma-3-270m")


def test_wrong_arguments_are_named(encoder: Gemma3TextEncoder) -> None:
    with pytest.raises(ConfigError, match="one of sequence, pooled, got 'mean'"):
        encoder.encode(["red"], "mean")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="prompts must be at least one, got none"):
        encoder.encode([])
    with pytest.raises(ConfigError, match="must be a list of texts, got one text 'red'"):
        encoder.encode("red")
    with pytest.raises(ConfigError, match="settings of the text encoder must fit Gemma-3"):
        build_text_model({**CONFIG, "hidden_size": 25})


def test_tokens_beyond_the_network_are_named() -> None:
    small = Gemma3TextEncoder(build_text_model({**CONFIG, "vocab_size": 6}), build_word_tokenizer(WORDS))
    with pytest.raises(ConfigError, match="must consist of the network's 6 tokens, got 'star'"):
        small.encode(["a star"])
