"""A tiny Qwen3-VL checkpoint with its processor, as a folder that Exo refers to."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from flowcore.models.exo.trunk import build_trunk
from flowcore.models.exo.trunk_config import BYTE_TOKENS, TRUNKS

TRUNK = {**TRUNKS["tiny"], "image_token_id": 261, "video_token_id": 260}
"""Settings of the tiny trunk with a tokenizer of its own, whose last special tokens are exchanged."""
REFERENCE = {"trunk": TRUNK, "embeds_trunk": False}
"""Overrides of the tiny preset that refer to it."""

TEMPLATE = (
    "{% for m in messages %}<|im_start|> {{ m.role }} {% for c in m.content %}"
    "{% if c.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c.text }} {% endif %}"
    "{% endfor %}<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|> assistant{% endif %}"
)


def write_trunk(folder: Path, seed: int = 5) -> Path:
    """Random weights under the published names, config.json, a tokenizer of words and a chat template."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    trunk = build_trunk(TRUNK)
    with torch.no_grad():
        trunk.get_parameter("language_model.norm.weight").normal_()
    save_file({f"model.{n}": t for n, t in trunk.state_dict().items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen3_vl", **TRUNK}))
    special = [*BYTE_TOKENS[:4], *reversed(BYTE_TOKENS[4:])]
    words = ["<unk>", "user", "assistant", "picture", *map(str, range(252)), *special]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(list(BYTE_TOKENS))
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    return folder
