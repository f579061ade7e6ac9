"""Tiny random T5 and CLIP text models with tokenizers of the published classes, in transformers' folders."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizerFast,
    GemmaTokenizer,
    T5Config,
    T5ForConditionalGeneration,
    T5TokenizerFast,
)

T5_SETTINGS: dict[str, Any] = {
    "vocab_size": 48,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 40,
    "num_layers": 2,
    "num_heads": 4,
    "feed_forward_proj": "gated-gelu",
    "decoder_start_token_id": 0,
}
CLIP_SETTINGS: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 1,
    "eos_token_id": 1,
    "bos_token_id": 0,
    "pad_token_id": 1,
}
T5GEMMA2_TEXT: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 12,
    "query_pre_attn_scalar": 12,
    "sliding_window": 300,
    "layer_types": ["sliding_attention", "full_attention"],
}
T5GEMMA2_CONFIG = {
    "model_type": "t5gemma2",
    "encoder": {"model_type": "t5gemma2_encoder", "text_config": T5GEMMA2_TEXT},
}
PROMPTS = ["a bee", "", "red cab, red bee", "ab " * 300]
PIECES = ["<pad>", "</s>", "<unk>", "\u2581", *"abcdefr,", "\u2581a", "red", "\u2581red", "bee"]


def t5_tokenizer() -> T5TokenizerFast:
    """Pieces with scores, as T5's."""
    return T5TokenizerFast(vocab=[(piece, -1.0 - len(piece) / 9) for piece in PIECES], extra_ids=0)


def clip_tokenizer() -> CLIPTokenizerFast:
    """Byte pairs with ends of words, as CLIP's."""
    letters = [*"abcdefr,", *(f"{letter}</w>" for letter in "abcdefr,")]
    merges = [("e", "e</w>"), ("b", "ee</w>"), ("r", "e")]
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(first + last for first, last in merges)]
    return CLIPTokenizerFast(vocab={word: number for number, word in enumerate(words)}, merges=merges)


def randomise(network: nn.Module, seed: int) -> nn.Module:
    """Give every parameter a value of its own size, so that no layer is without influence."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(std=0.3, generator=generator)
    return network.eval()


def t5_network(**settings: Any) -> T5ForConditionalGeneration:
    """Encoder and decoder, as published files hold them."""
    network = T5ForConditionalGeneration(T5Config(**{**T5_SETTINGS, **settings}))
    randomise(network, 0)
    return network


def clip_network() -> CLIPTextModel:
    """A text model as transformers builds it."""
    network = CLIPTextModel(CLIPTextConfig(**CLIP_SETTINGS))
    randomise(network, 1)
    return network


def write_folders(folder: Path) -> tuple[Path, Path]:
    """Write both with their tokenizers as transformers does; return their folders."""
    t5, clip = folder / "t5", folder / "clip"
    t5_network().save_pretrained(t5)
    t5_tokenizer().save_pretrained(t5)
    clip_network().save_pretrained(clip)
    clip_tokenizer().save_pretrained(clip)
    return t5, clip


def gemma_tokenizer() -> GemmaTokenizer:
    """Letters, with the special tokens of Gemma."""
    letters = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *"abcdefgh"]
    return GemmaTokenizer(
        vocab={letter: i for i, letter in enumerate(letters)}, merges=[], add_bos_token=True
    )


def write_t5gemma2(network: nn.Module, folder: Path) -> None:
    """Write a T5Gemma2's text half, further tensors, and its tokenizer, as transformers does."""
    state = {f"model.encoder.{name}": tensor for name, tensor in network.state_dict().items()}
    others = {"model.encoder.vision_tower.x": torch.zeros(2), "model.decoder.norm.weight": torch.zeros(2)}
    save_file({**state, **others}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(T5GEMMA2_CONFIG), encoding="utf-8")
    gemma_tokenizer().save_pretrained(folder)
