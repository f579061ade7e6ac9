"""Sizes and switches of SingleStreamDiT, its presets, and how to read them back from a checkpoint's tensors.

Source: Particle1904/SingleStreamDiT_T5Gemma2, config.py and model.py: 333d3fa (`v3`), 01b01b7 (`head`).
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

from torch import Tensor

from ...errors import CheckpointError, ConfigError
from ...layers.reading import TensorReader, check_names, stored_config

Variant = Literal["v3", "head"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SingleStreamConfig:
    """Everything that decides the parameters and the arithmetic of a SingleStreamDiT.

    variant: `v3` mixes the channels of every frequency in all blocks that see the image; `head` gives every
    channel a gain by frequency, in the noise refiners (use_fourier_in_refiner) and after the joint blocks
    (fourier_stack_depth). refiner_depth: blocks that see the image alone, and as many for the text alone.
    max_token_length: text tokens that have a position. dropout: share of a branch's values, in training.
    fourier_gate: start of the filters' gates, before tanh.
    """

    variant: Variant = "v3"
    in_channels: int = 16
    patch_size: int = 2
    hidden_size: int = 384
    depth: int = 20
    num_heads: int = 6
    text_embed_dim: int = 1152
    refiner_depth: int = 2
    max_token_length: int = 128
    rope_base: float = 10_000
    dropout: float = 0.05
    fourier_gate: float = 1e-4
    use_fourier_in_refiner: bool = True
    fourier_stack_depth: int = 0

    def __post_init__(self) -> None:
        """Check every field. Raises: ConfigError."""
        if self.variant not in get_args(Variant):
            raise ConfigError(f"variant must be one of {', '.join(get_args(Variant))}, got {self.variant!r}")
        for name, least in _LEAST.items():
            if getattr(self, name) < least:
                raise ConfigError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.hidden_size % self.num_heads or self.head_dim % 4:
            raise ConfigError(
                f"hidden_size must be num_heads times a multiple of 4, got {self.hidden_size} with "
                f"{self.num_heads} heads"
            )
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout must be in [0, 1), got {self.dropout}")
        if self.rope_base <= 0:
            raise ConfigError(f"rope_base must be positive, got {self.rope_base}")
        if self.variant == "v3" and (self.fourier_stack_depth or not self.use_fourier_in_refiner):
            raise ConfigError(
                "use_fourier_in_refiner must be true and fourier_stack_depth 0 in variant v3, whose blocks "
                f"all have a filter, got {self.use_fourier_in_refiner} and {self.fourier_stack_depth}"
            )

    @property
    def head_dim(self) -> int:
        """Width of an attention head."""
        return self.hidden_size // self.num_heads

    @property
    def mlp_dim(self) -> int:
        """Width of the hidden layer of a feed-forward: 8/3 of the width, rounded up to a multiple of 256."""
        return 256 * math.ceil(2 * 4 * self.hidden_size // 3 / 256)

    @property
    def token_dim(self) -> int:
        """Numbers in an image token before its projection."""
        return self.in_channels * self.patch_size**2

    @property
    def least_side(self) -> int:
        """Smallest number of tokens on a side of the image: reflection needs what it reflects."""
        if self.variant == "v3":
            return 1
        return 3 if self.use_fourier_in_refiner or self.fourier_stack_depth else 2

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "SingleStreamConfig":
        """Return the configuration of JSON-like values.

        Raises: ConfigError for an unknown key, a value that is no number, or one out of range.
        """
        check_names(cls, values)
        for name, value in values.items():
            if name != "variant" and not isinstance(value, int | float):
                raise ConfigError(f"{name} must be a number, got {value!r}")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON-like values, the inverse of `from_dict`."""
        return asdict(self)


_LEAST = {
    "in_channels": 1,
    "patch_size": 1,
    "hidden_size": 1,
    "depth": 1,
    "num_heads": 1,
    "text_embed_dim": 1,
    "refiner_depth": 0,
    "max_token_length": 1,
    "fourier_stack_depth": 0,
}

_V3_768 = SingleStreamConfig(hidden_size=768, num_heads=12, depth=16, fourier_gate=0.1)

PRESETS: Mapping[str, SingleStreamConfig] = {
    "tiny": SingleStreamConfig(
        hidden_size=32,
        depth=2,
        num_heads=2,
        text_embed_dim=32,
        refiner_depth=1,
        max_token_length=32,
        dropout=0.0,
        fourier_gate=0.1,
    ),
    "demo": SingleStreamConfig(
        hidden_size=128,
        depth=3,
        num_heads=4,
        text_embed_dim=128,
        refiner_depth=1,
        max_token_length=64,
        dropout=0.0,
        fourier_gate=0.1,
    ),
    "v3-384": SingleStreamConfig(),
    "v3-768": _V3_768,
    "head-768": replace(_V3_768, variant="head", fourier_gate=0.01, fourier_stack_depth=2),
}
"""v3-384, v3-768: the published sizes, for text states of T5Gemma2 1b-1b. head-768: HEAD's default, of which
nothing is published."""


def infer_config(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> SingleStreamConfig:
    """Return the configuration that tensors with bare SingleStreamDiT names have.

    Shapes decide whatever they can. `flowcore.config` of the metadata is asked only for the rest (how a token
    divides into channels and patch, rope_base, dropout, fourier_gate); without it a token has 16 channels and
    the others the defaults of the published models.
    Raises: CheckpointError if a tensor that is needed is missing or has a shape no SingleStreamDiT has.
    """
    reader = TensorReader(tensors, "single_stream")
    stored = stored_config(metadata)
    hidden_size, token_dim = reader.shape("x_embedder.weight", axes=2)
    (head_dim,) = reader.shape("blocks.0.attention_norm_q.weight", axes=1)
    in_channels, patch_size = _split_token(token_dim, stored)
    is_v3 = "blocks.0.fourier_filter.freq_mlp.0.weight" in tensors
    return SingleStreamConfig.from_dict(
        {
            **{name: stored[name] for name in _NOT_IN_SHAPES if name in stored},
            "variant": "v3" if is_v3 else "head",
            "in_channels": in_channels,
            "patch_size": patch_size,
            "hidden_size": hidden_size,
            "depth": len(reader.indices("blocks.")),
            "num_heads": hidden_size // head_dim,
            "text_embed_dim": reader.shape("cap_embedder.0.weight", axes=1)[0],
            "refiner_depth": len(reader.indices("noise_refiner.")),
            "max_token_length": reader.shape("text_pos_embed", axes=3)[1],
            "use_fourier_in_refiner": is_v3 or "noise_refiner.0.fourier_filter.gate" in tensors,
            "fourier_stack_depth": len(reader.indices("final_fourier_blocks.")),
        }
    )


_FLUX_CHANNELS = 16  # of the latents of all published models
_NOT_IN_SHAPES = ("rope_base", "dropout", "fourier_gate")


def _split_token(token_dim: int, stored: Mapping[str, Any]) -> tuple[int, int]:
    """Return channels and patch side of a token of token_dim numbers."""
    channels, patch = stored.get("in_channels"), stored.get("patch_size")
    if channels is None and patch is None:
        channels = _FLUX_CHANNELS
    if isinstance(patch, int) and patch > 0 and channels is None:
        channels = token_dim // patch**2
    if isinstance(channels, int) and channels > 0 and patch is None:
        patch = math.isqrt(token_dim // channels)
    if not (isinstance(channels, int) and isinstance(patch, int) and channels * patch**2 == token_dim):
        raise CheckpointError(
            f"x_embedder.weight must take in_channels * patch_size^2 numbers, got {token_dim} with channels "
            f"{channels!r} and patch {patch!r}; state in_channels and patch_size in metadata flowcore.config"
        )
    return channels, patch


def is_match(keys: Collection[str]) -> bool:
    """Return whether bare tensor names are those of a SingleStreamDiT.

    Its caption embedder has the names of Lumina 2's, which has neither text positions nor a local bias.
    """
    return "text_pos_embed" in keys and "blocks.0.local_bias.conv.weight" in keys


def version(keys: Collection[str]) -> str:
    """Return which revision wrote a model with these bare names."""
    return "v3" if any(".fourier_filter.freq_mlp." in key for key in keys) else "head"
