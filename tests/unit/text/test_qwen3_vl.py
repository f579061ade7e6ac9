"""Prompts and pictures for Exo's trunk."""

import json
from pathlib import Path

import pytest
import torch

from flowcore.errors import CheckpointError, ConfigError, ShapeError
from flowcore.text.qwen3_vl import ByteTokenizer, ChatTokenizer, encode_prompts, fit_pictures, to_patches


def test_bytes_and_special_tokens() -> None:
    tokenizer = ByteTokenizer()
    text = tokenizer.chat("a\u00e9", has_image=True)
    assert text == (
        "<|im_start|>user\na\u00e9<|vision_start|><|image_pad|><|vision_end|><|im_end|>\n<|im_start|>assistant\n"
    )
    ids = tokenizer.ids(text)
    assert ids[:6] == [256, *b"user\n"]
    assert ids[6:12] == [97, 0xC3, 0xA9, 258, 260, 259]
    assert ids[12] == 257


def test_words_are_one_token_each() -> None:
    tokenizer = ByteTokenizer(["a", "red", "redder", "user"])
    assert tokenizer.ids("a red A") == [262, 263, 262]
    assert tokenizer.ids("a  Redder,red") == [262, 32, 264, 44, 263]
    assert tokenizer.ids("tired reds") == [*b"tired reds"]
    chat = tokenizer.ids(tokenizer.chat("red", has_image=False))
    assert chat == [256, 265, 10, 263, 257, 10, 256, *b"assistant\n"]


@pytest.mark.parametrize("words", [(), ("a", "red", "circle")])
def test_text_of_token_ids(words: tuple[str, ...]) -> None:
    tokenizer = ByteTokenizer(words)
    for text in ("a red circle", "a caf\u00e9, red"):
        assert tokenizer.text([256, *tokenizer.ids(text), 257, 262 + len(words)]) == text


def test_an_answer_follows_its_prompt() -> None:
    tokenizer = ByteTokenizer()
    images = torch.zeros(2, 3, 64, 64)
    plain = encode_prompts(tokenizer, ["", "red"], images)
    found = encode_prompts(tokenizer, ["", "red"], images, answers=["blue", "b"])
    assert torch.equal(found.extras["pixels"], plain.extras["pixels"])
    for row, answer in enumerate(("blue", "b")):
        asked = plain.context[row, plain.context_mask[row], 0].tolist()
        told = found.context[row, found.context_mask[row], 0].tolist()
        assert told == [*asked, *answer.encode(), 257]


def test_conditions_of_several_prompts() -> None:
    images = torch.zeros(2, 3, 64, 96)
    found = encode_prompts(ByteTokenizer(), ["", "red"], images)
    assert found.context.shape == (2, found.context_mask.shape[1], 1)
    assert not found.context.is_floating_point()
    assert (found.context == 260).sum(dim=(1, 2)).tolist() == [6, 6]
    assert int(found.context_mask[1].sum() - found.context_mask[0].sum()) == 3
    assert found.extras["pixels"].shape == (2, 24, 1536)
    assert found.extras["grids"].tolist() == [[1, 4, 6], [1, 4, 6]]
    assert not encode_prompts(ByteTokenizer(), ["red"]).extras


@pytest.mark.parametrize(
    ("height", "width", "size", "tokens"),
    [
        (512, 512, (512, 512), 256),
        (1024, 1024, (1024, 1024), 1024),
        (1024, 1280, (1024, 1280), 1280),
        (2048, 2048, (1120, 1120), 1225),
        (256, 256, (512, 512), 256),
    ],
)
def test_budget_of_visual_tokens(height: int, width: int, size: tuple[int, int], tokens: int) -> None:
    found = fit_pictures(torch.zeros(1, 3, height, width))
    assert found.shape[-2:] == size
    assert size[0] * size[1] // 32**2 == tokens


def test_patches_equal_the_librarys_processor() -> None:
    from transformers import Qwen2VLImageProcessorPil as Processor

    image = torch.randint(0, 256, (64, 96, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    processor = Processor(
        patch_size=16,
        merge_size=2,
        temporal_patch_size=2,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
        size={"shortest_edge": 32 * 32, "longest_edge": 1280 * 32 * 32},
    )
    library = processor(images=[image.numpy()], return_tensors="pt")
    pixels, grids = to_patches(image.movedim(-1, 0)[None] / 127.5 - 1)
    assert grids.tolist() == library["image_grid_thw"].tolist()
    assert (pixels[0] - library["pixel_values"]).abs().max() < 1e-6


def test_refused() -> None:
    with pytest.raises(ConfigError, match=r"must not contain <\|image_pad\|>"):
        encode_prompts(ByteTokenizer(), ["a <|image_pad|>"])
    with pytest.raises(ShapeError, match="images must be `2 3 h w`"):
        encode_prompts(ByteTokenizer(), ["a", "b"], torch.zeros(1, 3, 32, 32))
    with pytest.raises(ShapeError, match="must be multiples of 32 pixels"):
        to_patches(torch.zeros(1, 3, 40, 32))


def write_processor(folder: Path) -> None:
    """A small tokenizer with the special tokens of Qwen."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<unk>", "user", "assistant", "red", "<|image_pad|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(words[4:])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text("{}")


TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }} {% for c in m.content %}"
    "{% if c.type == 'image' %}<|image_pad|>{% else %}{{ c.text }} {% endif %}{% endfor %}<|im_end|>"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant{% endif %}"
)


@pytest.mark.parametrize("where", ["chat_template.jinja", "chat_template.json", "tokenizer_config.json"])
def test_the_checkpoints_own_template(tmp_path: Path, where: str) -> None:
    write_processor(tmp_path)
    text = TEMPLATE if where.endswith("jinja") else json.dumps({"chat_template": TEMPLATE})
    (tmp_path / where).write_text(text)
    found = encode_prompts(ChatTokenizer(tmp_path), ["red"], torch.zeros(1, 3, 32, 64))
    assert found.context[0, :, 0].tolist() == [5, 1, 3, 4, 4, 6, 5, 2]


def test_missing_processor(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"its processor, got no tokenizer\.json and no tokenizer_config"
    ):
        ChatTokenizer(tmp_path)
    write_processor(tmp_path)
    with pytest.raises(CheckpointError, match="must come with a chat template, got none"):
        ChatTokenizer(tmp_path)
    (tmp_path / "chat_template.json").write_text("[]")
    with pytest.raises(CheckpointError, match="must be JSON with a chat_template"):
        ChatTokenizer(tmp_path)
