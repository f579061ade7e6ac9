"""Settings of the Qwen3-VL networks that Exo is built over: the published sizes, and small random ones."""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ...errors import CheckpointError, ConfigError
from ...layers.reading import TensorReader

TrunkConfig = Mapping[str, Any]
"""A config.json of Qwen3-VL, reduced to what decides the network: text_config, vision_config, token ids."""

MERGE = 2
"""Patches on a side of a visual token, in every Qwen3-VL."""
BYTE_TOKENS = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|pad|>")
"""Special tokens of the small trunks, numbered from 256 on; below are the 256 bytes."""

_TOKEN_IDS = {
    "image_token_id": 151655,
    "video_token_id": 151656,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
}


def _published(
    layers: int, hidden: int, mlp: int, heads: int, *, tied: bool, vision: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the settings of a published size."""
    return {
        "text_config": {
            "vocab_size": 151_936,
            "hidden_size": hidden,
            "intermediate_size": mlp,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 262_144,
            "rms_norm_eps": 1e-6,
            "rope_parameters": _rope(5e6, (24, 20, 20)),
        },
        "vision_config": {
            "patch_size": 16,
            "spatial_merge_size": MERGE,
            "temporal_patch_size": 2,
            "out_hidden_size": hidden,
            "num_position_embeddings": 2304,
            "num_heads": 16,
            **vision,
        },
        **_TOKEN_IDS,
        "tie_word_embeddings": tied,
    }


def _small(
    layers: int,
    hidden: int,
    mlp: int,
    heads: tuple[int, int, int],
    vision: tuple[int, int, int, list[int]],
    *,
    patch: int = 16,
) -> dict[str, Any]:
    """Return the settings of a small trunk.

    heads: of queries, of keys, and their width; vision: width, depth, positions, DeepStack layers.
    """
    width, depth, positions, taps = vision
    ids = {name: 256 + number for number, name in enumerate(BYTE_TOKENS)}
    sections = {16: (4, 2, 2), 64: (12, 10, 10)}[heads[2]]
    return {
        "text_config": {
            "vocab_size": 512,
            "hidden_size": hidden,
            "intermediate_size": mlp,
            "num_hidden_layers": layers,
            "num_attention_heads": heads[0],
            "num_key_value_heads": heads[1],
            "head_dim": heads[2],
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-6,
            "rope_parameters": _rope(1e4, sections),
        },
        "vision_config": {
            "patch_size": patch,
            "spatial_merge_size": MERGE,
            "temporal_patch_size": 2,
            "out_hidden_size": hidden,
            "num_position_embeddings": positions,
            "num_heads": max(2, width // 32),
            "depth": depth,
            "hidden_size": width,
            "intermediate_size": 4 * width,
            "deepstack_visual_indexes": taps,
        },
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
        "tie_word_embeddings": True,
    }


def _rope(theta: float, sections: tuple[int, int, int]) -> dict[str, Any]:
    return {
        "rope_type": "default",
        "rope_theta": theta,
        "mrope_section": list(sections),
        "mrope_interleaved": True,
    }


_VISION_1024 = {
    "depth": 24,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "deepstack_visual_indexes": [5, 11, 17],
}
_VISION_1152 = {
    "depth": 27,
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "deepstack_visual_indexes": [8, 16, 24],
}

TRUNKS: Mapping[str, TrunkConfig] = {
    "tiny": _small(4, 64, 128, (4, 2, 16), (32, 3, 64, [0, 2])),
    "demo": _small(6, 192, 512, (3, 3, 64), (96, 4, 64, [1, 2])),
    "demo-fine": _small(6, 192, 512, (3, 3, 64), (96, 2, 64, [0, 1]), patch=8),
    "small": _small(8, 320, 896, (5, 5, 64), (160, 6, 256, [1, 3])),
    "qwen3-vl-2b": _published(28, 2048, 6144, 16, tied=True, vision=_VISION_1024),
    "qwen3-vl-4b": _published(36, 2560, 9728, 32, tied=True, vision=_VISION_1024),
    "qwen3-vl-8b": _published(36, 4096, 12_288, 32, tied=False, vision=_VISION_1152),
}
"""tiny, demo, small: random, trained with the rest; demo-fine sees more patches, in fewer layers. The others
have the shapes of the published checkpoints, Instruct and Thinking alike."""

_KEPT = {
    "text_config": (
        *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
        *("num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "hidden_act"),
        *("rope_parameters", "attention_bias"),
    ),
    "vision_config": (
        *("depth", "hidden_size", "hidden_act", "intermediate_size", "num_heads", "in_channels"),
        *("patch_size", "spatial_merge_size", "temporal_patch_size", "out_hidden_size"),
        *("num_position_embeddings", "deepstack_visual_indexes"),
    ),
}


def trunk_config(settings: Mapping[str, Any], *, source: str) -> TrunkConfig:
    """Return what decides the network, of a config.json.

    Older files state the rotary embedding as rope_theta and rope_scaling.
    Raises: CheckpointError if the settings are another model's.
    """
    kind = settings.get("model_type", "qwen3_vl")
    parts = {name: settings.get(name) for name in _KEPT}
    if kind != "qwen3_vl" or not all(isinstance(part, Mapping) for part in parts.values()):
        raise CheckpointError(
            f"the trunk {source} must be a dense Qwen3-VL (model_type qwen3_vl), got {kind}; give the folder "
            "of a Qwen3-VL checkpoint of 2B, 4B or 8B"
        )
    kept = {
        name: {key: part[key] for key in _KEPT[name] if key in part}
        for name, part in parts.items()
        if part is not None
    }
    text = parts["text_config"] or {}
    if "rope_parameters" not in text:
        scaling = text.get("rope_scaling") or {}
        sections = scaling.get("mrope_section", (24, 20, 20))
        kept["text_config"]["rope_parameters"] = _rope(text.get("rope_theta", 5e6), sections)
    ids = {name: settings.get(name, default) for name, default in _TOKEN_IDS.items()}
    return {**kept, **ids, "tie_word_embeddings": bool(settings.get("tie_word_embeddings", False))}


def check_trunk(config: TrunkConfig) -> None:
    """Check what Exo needs of a trunk. Raises: ConfigError."""
    try:
        text, vision = config["text_config"], config["vision_config"]
        layers, merge = text["num_hidden_layers"], vision["spatial_merge_size"]
        sections, head_dim = text["rope_parameters"]["mrope_section"], text["head_dim"]
    except (KeyError, TypeError) as err:
        raise ConfigError(f"trunk must hold the settings of a Qwen3-VL, got none for {err}") from err
    if layers < 4:
        raise ConfigError(f"the trunk must have at least 4 layers, one for each adapter, got {layers}")
    if merge != MERGE:
        raise ConfigError(f"the trunk's spatial_merge_size must be {MERGE}, got {merge}")
    half = head_dim // 2
    fits = sum(sections) == half and 3 * sections[1] <= half + 1 and 3 * sections[2] <= half
    if not fits:
        raise ConfigError(
            f"mrope_section must sum to head_dim / 2 = {half} with height and width at most a third each, "
            f"got {list(sections)}"
        )


def infer_trunk(tensors: Mapping[str, Tensor], stated: Mapping[str, Any] | None = None) -> TrunkConfig:
    """Return the settings of tensors under their bare names (`language_model.*`, `visual.*`).

    stated: settings that win where shapes do not tell: positions, DeepStack layers, heads of the tower. What
    neither tells is as in the known trunk of the same shapes, else as published.
    Raises: CheckpointError if a tensor that is needed is missing.
    """
    reader = TensorReader(tensors, "Qwen3-VL")
    first = "language_model.layers.0"
    vocab, hidden = reader.shape("language_model.embed_tokens.weight", 2)
    head_dim = reader.shape(f"{first}.self_attn.q_norm.weight", 1)[0]
    queries = reader.shape(f"{first}.self_attn.q_proj.weight", 2)[0]
    keys = reader.shape(f"{first}.self_attn.k_proj.weight", 2)[0]
    positions, width = reader.shape("visual.pos_embed.weight", 2)
    kernel = reader.shape("visual.patch_embed.proj.weight", 5)
    text = {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": reader.shape(f"{first}.mlp.gate_proj.weight", 2)[0],
        "num_hidden_layers": 1 + max(reader.indices("language_model.layers.")),
        "num_attention_heads": queries // head_dim,
        "num_key_value_heads": keys // head_dim,
        "head_dim": head_dim,
    }
    vision = {
        "depth": 1 + max(reader.indices("visual.blocks.")),
        "hidden_size": width,
        "intermediate_size": reader.shape("visual.blocks.0.mlp.linear_fc1.weight", 2)[0],
        "patch_size": kernel[-1],
        "temporal_patch_size": kernel[2],
        "num_position_embeddings": positions,
        "out_hidden_size": hidden,
    }
    rest = stated or find_trunk(text["hidden_size"], text["num_hidden_layers"]) or TRUNKS["qwen3-vl-8b"]
    taps = len(reader.indices("visual.deepstack_merger_list."))
    known = {**rest["vision_config"], **vision}
    layers = known["deepstack_visual_indexes"]
    if len(layers) != taps or any(layer >= known["depth"] for layer in layers):
        known["deepstack_visual_indexes"] = list(range(taps))
    return {**rest, "text_config": {**rest["text_config"], **text}, "vision_config": known}


def find_trunk(hidden: int, layers: int) -> TrunkConfig | None:
    """Return the known trunk of a width and a number of layers, or None."""
    for config in TRUNKS.values():
        text = config["text_config"]
        if (text["hidden_size"], text["num_hidden_layers"]) == (hidden, layers):
            return config
    return None


def is_trunk(names: Mapping[str, Any]) -> bool:
    """Return whether the names, with or without `model.`, are those of a Qwen3-VL."""
    anchor = re.compile(r"(model\.)?visual\.deepstack_merger_list\.0\.norm\.weight")
    return any(anchor.fullmatch(name) for name in names)
