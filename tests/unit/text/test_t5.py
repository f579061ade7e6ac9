"""T5 text encoder: tokens and states of transformers, both ways to treat padding, files of every form."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close

from flowcore.conditioning import TextShape
from flowcore.errors import CheckpointError, ConfigError
from flowcore.text.encoder import TextEncoder
from flowcore.text.loading import load_text_encoder
from flowcore.text.t5 import T5TextEncoder
from tests.unit.text.small import PROMPTS, t5_network, t5_tokenizer, write_folders

TINYFLUX = TextShape(width=32, length=24)
FLUX = TextShape(width=32, length=40, masks_padding=False)
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folders(tmp_path_factory.mktemp("t5"))[0]


@pytest.fixture
def single(folder: Path, tmp_path: Path) -> Path:
    """Weights of the encoder alone under ComfyUI's names, with the tokenizer beside them."""
    state = {name: t for name, t in load_file(folder / "model.safetensors").items() if "decoder" not in name}
    state.pop("lm_head.weight", None)  # transformers before 5 writes it though it is tied
    save_file(state, tmp_path / "t5.safetensors")
    (tmp_path / "t5.tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    return tmp_path / "t5.safetensors"


def states(encoder: TextEncoder, prompts: list[str] = PROMPTS) -> Tensor:
    conditioning = encoder.encode(prompts)
    assert conditioning.context is not None
    assert conditioning.context_mask is None
    return conditioning.context


@pytest.mark.parametrize("shape", [TINYFLUX, FLUX])
def test_tokens_and_states_are_those_of_transformers(folder: Path, shape: TextShape) -> None:
    told = t5_tokenizer()(
        PROMPTS, max_length=shape.length, padding="max_length", truncation=True, return_tensors="pt"
    )
    encoder = load_text_encoder(folder, shape=shape)
    assert isinstance(encoder, T5TextEncoder)
    ids, mask = encoder.tokenize(PROMPTS)
    assert torch.equal(ids, told["input_ids"])
    assert torch.equal(mask.long(), told["attention_mask"])
    assert ids[3, -1] == 1  # the end stays when the text is cut
    network = t5_network().get_encoder()
    with torch.no_grad():
        expected = network(
            input_ids=ids, attention_mask=told["attention_mask"] if shape.masks_padding else None
        ).last_hidden_state
    assert_close(states(encoder), expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("shape", [TINYFLUX, FLUX])
def test_result_does_not_depend_on_companions(folder: Path, shape: TextShape) -> None:
    encoder = load_text_encoder(folder, shape=shape)
    together = states(encoder)
    for prompt, own in zip(PROMPTS, together, strict=True):
        assert_close(own, states(encoder, [prompt])[0], atol=TOLERANCE, rtol=0)
    assert together.shape == (4, shape.length, 32)
    assert together.abs().sum(dim=2).min() > 0  # states of padding are kept


def test_attention_leaves_padding_out_only_where_the_shape_says(folder: Path) -> None:
    for masks, same in ((True, True), (False, False)):
        short, long = (
            states(
                load_text_encoder(folder, shape=TextShape(width=None, length=length, masks_padding=masks)),
                ["a bee"],
            )
            for length in (16, 32)
        )
        assert torch.allclose(short[:, :4], long[:, :4], atol=TOLERANCE) == same


def test_single_file_needs_no_config(folder: Path, single: Path) -> None:
    expected = states(load_text_encoder(folder, shape=FLUX))
    for path in (single, folder / "model.safetensors"):
        assert torch.equal(states(load_text_encoder(path, shape=FLUX)), expected)
    (single.parent / "config.json").write_text(
        '{"model_type": "gemma3"}', encoding="utf-8"
    )  # of another file
    assert torch.equal(states(load_text_encoder(single, shape=FLUX)), expected)
    state = load_file(single)
    state["encoder.embed_tokens.weight"] = state.pop("shared.weight")
    save_file({f"text_encoders.t5xxl.transformer.{name}": t for name, t in state.items()}, single)
    assert torch.equal(states(load_text_encoder(single, shape=FLUX)), expected)


def test_feed_forward_of_the_first_t5_is_told_from_its_tensors(tmp_path: Path) -> None:
    network = t5_network(feed_forward_proj="relu")
    save_file(
        {name: t.contiguous() for name, t in network.state_dict().items() if name.startswith("encoder.")},
        tmp_path / "old.safetensors",
    )
    t5_tokenizer().save_pretrained(tmp_path)
    encoder = load_text_encoder(tmp_path / "old.safetensors", shape=FLUX)
    assert isinstance(encoder, T5TextEncoder)
    ids, _ = encoder.tokenize(PROMPTS)
    with torch.no_grad():
        expected = network.get_encoder()(input_ids=ids).last_hidden_state
    assert_close(states(encoder), expected, atol=TOLERANCE, rtol=0)


def test_tokenizer_in_the_file_or_named(single: Path) -> None:
    expected = states(load_text_encoder(single))
    beside = single.with_name("t5.tokenizer.json")
    text = beside.read_bytes()
    beside.unlink()
    with pytest.raises(CheckpointError, match=r"t5\.safetensors must come with tokenizer\.json, got none"):
        load_text_encoder(single)
    named = single.parent / "tokenizer" / "tokenizer.json"
    named.parent.mkdir()
    named.write_bytes(text)
    for place in (named, named.parent):
        assert torch.equal(states(load_text_encoder([single, place])), expected)
    packed = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    save_file({**load_file(single), "tokenizer_json": packed}, single)
    assert torch.equal(states(load_text_encoder(single)), expected)
    named.write_text("{}", encoding="utf-8")
    with pytest.raises(
        CheckpointError, match=r"must be a tokenizer\.json, or a folder with one or with weights"
    ):
        load_text_encoder([single, named])


def test_eight_bits_become_sixteen(single: Path) -> None:
    state = load_file(single)
    exact = {name: tensor.to(torch.float8_e4m3fn).to(torch.bfloat16) for name, tensor in state.items()}
    save_file(exact, single)
    expected = states(load_text_encoder(single))
    save_file({name: tensor.to(torch.float8_e4m3fn) for name, tensor in state.items()}, single)
    assert torch.equal(states(load_text_encoder(single)), expected)
    wide = "encoder.block.0.layer.0.SelfAttention.q"
    scaled = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in exact.items()}
    scaled[f"{wide}.weight"] = (exact[f"{wide}.weight"].float() * 2).to(torch.float8_e4m3fn)
    scaled[f"{wide}.scale_weight"] = torch.tensor(0.5)
    scaled["scaled_fp8"] = torch.empty(2, dtype=torch.float8_e4m3fn)
    save_file(scaled, single)
    assert torch.equal(states(load_text_encoder(single)), expected)


def test_widest_layers_are_never_in_float16(single: Path) -> None:
    save_file({name: tensor.half() for name, tensor in load_file(single).items()}, single)
    encoder = load_text_encoder(single)
    assert isinstance(encoder, T5TextEncoder)
    kinds = {name.endswith(".wo.weight"): p.dtype for name, p in encoder.model.named_parameters()}
    assert kinds == {True: torch.float32, False: torch.float16}
    assert torch.isfinite(states(encoder)).all()
    encoder.to(dtype=torch.bfloat16)
    assert {p.dtype for p in encoder.model.parameters()} == {torch.bfloat16}


def test_identity_follows_weights_dtype_tokenizer_and_length(folder: Path, single: Path) -> None:
    base = load_text_encoder(folder, shape=FLUX)
    assert base.identity == load_text_encoder(single, shape=FLUX).identity
    others = [
        load_text_encoder(folder, shape=TINYFLUX),
        load_text_encoder(folder, shape=FLUX).to(dtype=torch.bfloat16),
    ]
    state = load_file(single)
    state["encoder.final_layer_norm.weight"][0] += 1
    save_file(state, single)
    others.append(load_text_encoder(single, shape=FLUX))
    assert len({base.identity, *(other.identity for other in others)}) == 4


def test_loading_maps_the_file(folder: Path) -> None:
    encoder = load_text_encoder(folder)
    assert isinstance(encoder, T5TextEncoder)
    embedding, decoder_copy = encoder.model.shared.weight, encoder.model.encoder.embed_tokens.weight
    assert embedding.data_ptr() == decoder_copy.data_ptr()
    assert not any(parameter.requires_grad for parameter in encoder.model.parameters())


def test_faulty_files_are_named(single: Path) -> None:
    state = load_file(single)
    norm = state.pop("encoder.final_layer_norm.weight")
    save_file({**state, "encoder.stray": norm}, single)
    with pytest.raises(
        CheckpointError, match=r"t5\.safetensors .* 1 missing \(encoder\.final_layer_norm\.weight\); 1 un"
    ):
        load_text_encoder(single)
    del state["shared.weight"]
    save_file(state, single)
    with pytest.raises(
        CheckpointError, match=r"t5\.safetensors must hold the matrix shared\.weight of a T5 encoder"
    ):
        load_text_encoder(single)
    bias = "encoder.block.{}.layer.0.SelfAttention.relative_attention_bias.weight"
    save_file({**state, bias.format(1): state[bias.format(0)].clone()}, single)
    with pytest.raises(CheckpointError, match=r"got .* tensors of a UMT5 or other T5-like encoder"):
        load_text_encoder(single)


def test_wrong_requests_are_named(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"tokens of the model's width 64, got 32 .*t5"):
        load_text_encoder(folder, shape=TextShape(width=64, length=8))
    with pytest.raises(ConfigError, match=r"must come with a CLIP text model of width 64 .*; pass both"):
        load_text_encoder(folder, shape=TextShape(width=32, pooled=64, needs_pooled=True, length=8))
    with pytest.raises(ConfigError, match=r"must be one for the tokens .* got t5, t5 in "):
        load_text_encoder([folder, folder])
    with pytest.raises(ConfigError, match="text mode of a t5 encoder must be one of sequence, got 'pooled'"):
        load_text_encoder(folder).encode(["a"], "pooled")
    assert load_text_encoder(folder).unknown_words("a zoo") == ["zoo"]
