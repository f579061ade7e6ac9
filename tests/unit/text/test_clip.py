"""CLIP text encoder: tokens and vector of transformers; joined with T5; files of every form; wrong files."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close

from flowcore.conditioning import TextShape
from flowcore.errors import CheckpointError, ConfigError
from flowcore.text.clip import ClipTextEncoder, from_files
from flowcore.text.files import read_text_files
from flowcore.text.loading import load_text_encoder
from flowcore.text.pair import PairTextEncoder
from tests.unit.text.small import PROMPTS, clip_network, clip_tokenizer, write_folders

SHAPE = TextShape(width=32, pooled=64, needs_pooled=True, length=24)
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_folders(tmp_path_factory.mktemp("pair"))


def clip(path: Path) -> ClipTextEncoder:
    (files,) = read_text_files(path)
    return from_files(files)


def vectors(encoder: ClipTextEncoder, prompts: list[str] = PROMPTS) -> Tensor:
    pooled = encoder.encode(prompts).pooled
    assert pooled is not None
    return pooled


def test_tokens_and_vector_are_those_of_transformers(folders: tuple[Path, Path]) -> None:
    told = clip_tokenizer()(
        PROMPTS, max_length=77, padding="max_length", truncation=True, return_tensors="pt"
    )
    encoder = clip(folders[1])
    ids, _ = encoder.tokenize(PROMPTS)
    assert torch.equal(ids, told["input_ids"])
    assert ids[3, -1] == 1  # the end stays when the text is cut
    network = clip_network()
    with torch.no_grad():
        expected = network(input_ids=ids).pooler_output
        masked = network(input_ids=ids, attention_mask=told["attention_mask"]).pooler_output
    assert_close(vectors(encoder), expected, atol=TOLERANCE, rtol=0)
    assert_close(vectors(encoder), masked, atol=TOLERANCE, rtol=0)
    assert encoder.encode(PROMPTS).context is None


def test_result_does_not_depend_on_companions(folders: tuple[Path, Path]) -> None:
    encoder = clip(folders[1])
    for prompt, own in zip(PROMPTS, vectors(encoder), strict=True):
        assert_close(own, vectors(encoder, [prompt])[0], atol=TOLERANCE, rtol=0)
    assert not torch.allclose(*vectors(encoder, ["a bee", "red bee"]), atol=1e-2)


@pytest.mark.parametrize("prefix", ["", "text_model.", "text_encoders.clip_l.transformer.text_model."])
def test_single_file_needs_no_config(folders: tuple[Path, Path], prefix: str, tmp_path: Path) -> None:
    state = clip(folders[1]).model.state_dict()
    others = {"logit_scale": torch.tensor(1.0), "text_projection.weight": torch.zeros(2, 2)}
    if prefix:
        others["vision_model.embeddings.patch_embedding.weight"] = torch.zeros(2)
        others[f"{prefix}embeddings.position_ids"] = torch.arange(77)[None]
    save_file(
        {**{prefix + name: tensor for name, tensor in state.items()}, **others}, tmp_path / "l.safetensors"
    )
    shutil.copy(folders[1] / "tokenizer.json", tmp_path)
    encoder = clip(tmp_path / "l.safetensors")
    assert torch.equal(vectors(encoder), vectors(clip(folders[1])))
    assert encoder.model.config.hidden_act == "quick_gelu"


def test_heads_and_activation_come_from_the_config_where_there_is_one(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    shutil.copytree(folders[1], tmp_path / "own")
    path = tmp_path / "own" / "config.json"
    values = {**json.loads(path.read_text(encoding="utf-8")), "num_attention_heads": 4, "hidden_act": "gelu"}
    path.write_text(json.dumps({"model_type": "clip", "text_config": values}), encoding="utf-8")
    config = clip(tmp_path / "own").model.config
    assert (config.num_attention_heads, config.hidden_act) == (4, "gelu")


def test_tokenizer_may_be_vocabulary_and_merges(folders: tuple[Path, Path], tmp_path: Path) -> None:
    shutil.copytree(folders[1], tmp_path / "old")
    backend = json.loads((tmp_path / "old" / "tokenizer.json").read_text(encoding="utf-8"))
    (tmp_path / "old" / "tokenizer.json").unlink()
    merges = "\n".join(" ".join(pair) for pair in backend["model"]["merges"])
    (tmp_path / "old" / "vocab.json").write_text(json.dumps(backend["model"]["vocab"]), encoding="utf-8")
    (tmp_path / "old" / "merges.txt").write_text(f"#version: 0.2\n{merges}\n", encoding="utf-8")
    assert torch.equal(clip(tmp_path / "old").tokenize(PROMPTS)[0], clip(folders[1]).tokenize(PROMPTS)[0])


def test_pair_gives_states_and_vector(folders: tuple[Path, Path]) -> None:
    pair = load_text_encoder(folders, shape=SHAPE)
    assert isinstance(pair, PairTextEncoder)
    assert (pair.width, pair.pooled_width) == (32, 64)
    told = pair.encode(PROMPTS)
    assert torch.equal(told.pooled, vectors(clip(folders[1])))
    assert torch.equal(told.context, pair.states.encode(PROMPTS).context)
    swapped = load_text_encoder(folders[::-1], shape=SHAPE)
    assert swapped.identity == pair.identity
    assert pair.identity != load_text_encoder(folders[0], shape=TextShape(width=32, length=8)).identity
    assert pair.to(dtype=torch.bfloat16).encode(["a bee"]).pooled.dtype == torch.float32
    assert pair.unknown_words("a zoo") == ["zoo"]


def test_pair_in_one_folder_or_file(folders: tuple[Path, Path], tmp_path: Path) -> None:
    expected = load_text_encoder(folders, shape=SHAPE).encode(PROMPTS)
    t5, clip_l = (tmp_path / "diffusers" / name for name in ("text_encoder_2", "text_encoder"))
    for source, target, number in ((folders[0], t5, "_2"), (folders[1], clip_l, "")):
        shutil.copytree(source, target)
        (target.parent / f"tokenizer{number}").mkdir()
        (target / "tokenizer.json").rename(target.parent / f"tokenizer{number}" / "tokenizer.json")
    joint = {
        f"text_encoders.{name}.transformer.{key}": tensor
        for name, folder in (("t5xxl", t5), ("clip_l", clip_l))
        for key, tensor in load_file(folder / "model.safetensors").items()
    }
    save_file({**joint, "model.diffusion_model.x": torch.zeros(1)}, tmp_path / "all.safetensors")
    tokenizers = [tmp_path / "diffusers" / f"tokenizer{number}" for number in ("", "_2")]
    for sources in ([tmp_path / "diffusers"], [tmp_path / "all.safetensors", *tokenizers]):
        told = load_text_encoder(sources, shape=SHAPE).encode(PROMPTS)
        assert torch.equal(told.pooled, expected.pooled)
        assert torch.equal(told.context, expected.context)


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("vision_model.embeddings.patch_embedding.weight", "an image encoder such as CLIP vision"),
        ("transformer.resblocks.0.attn.in_proj_weight", "an OpenCLIP model"),
        ("model.layers.0.self_attn.q_proj.weight", "a language model of another kind"),
        ("lora_te1_text_model_encoder_layers_0.lora_down.weight", "an adapter"),
        ("encoder.conv_in.weight", "a VAE"),
        ("double_blocks.0.img_attn.qkv.weight", "a diffusion model"),
        ("stray", r"something else \(stray\)"),
    ],
)
def test_other_files_are_recognised(name: str, what: str, tmp_path: Path) -> None:
    save_file({name: torch.zeros(1)}, tmp_path / "other.safetensors")
    (tmp_path / "tokenizer.json").write_text("{}", encoding="utf-8")
    with pytest.raises(CheckpointError, match=rf"other\.safetensors must hold a .*, got 1 tensors of {what}"):
        load_text_encoder(tmp_path / "other.safetensors")


def test_wrong_requests_are_named(folders: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"must be one for the tokens .* got clip in "):
        load_text_encoder(folders[1])
    with pytest.raises(ConfigError, match=r"vector must have the model's width None, got 64 .* or none"):
        load_text_encoder(folders, shape=TextShape(width=32, length=8))
    shutil.copytree(folders[1], tmp_path / "mixed")
    shutil.copy(folders[0] / "tokenizer.json", tmp_path / "mixed")
    with pytest.raises(CheckpointError, match="must have the tokens of CLIP, got none for"):
        load_text_encoder([folders[0], tmp_path / "mixed"])
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin must be a safetensors file, got a pickle"):
        load_text_encoder(tmp_path / "pytorch_model.bin")
    state = {
        name: tensor[:, :60].contiguous() if tensor.ndim == 2 and tensor.shape[1] == 64 else tensor
        for name, tensor in clip(folders[1]).model.state_dict().items()
    }
    save_file(state, tmp_path / "narrow.safetensors")
    shutil.copy(folders[1] / "tokenizer.json", tmp_path)
    with pytest.raises(
        CheckpointError, match=r"narrow\.safetensors must be a multiple of 64 without a config"
    ):
        clip(tmp_path / "narrow.safetensors")
