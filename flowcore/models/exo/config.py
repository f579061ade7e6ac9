"""Sizes of Exo, its presets, and how to read them back from a checkpoint's tensors.

Exo has no published weights; the presets follow the numbers of its description.
"""

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from torch import Tensor

from ...errors import CheckpointError, ConfigError
from ...layers.reading import TensorReader, check_names, stored_config
from .trunk_config import BYTE_TOKENS, TRUNKS, TrunkConfig, check_trunk, find_trunk, infer_trunk

MAX_ITERATIONS = 8
"""Refinement iterations that have a vector of their own."""
NUM_ADAPTERS = 4
_STORED = ("edit_fraction", "lora_alpha", "words", "rewrites", "image_first")
"""Fields that no shape tells."""
_NOT_SIZES = ("trunk", "embeds_trunk", "memory_compares", *_STORED)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExoConfig:
    """Everything that decides the parameters and the arithmetic of an Exo model; defaults are those at 8B.

    trunk: settings of the Qwen3-VL below. embeds_trunk: whether the model owns its trunk's weights, and
    files hold them; without it a trunk is attached. latent_channels: as the model sees them (128 = FLUX.2,
    64 = FLUX.1 packed, 16 = unpacked). memory_*: the grid that latents and edits are read from, a cell for
    2 x 2 latents; memory_compares: it also has the picture's estimated latents, fading with noise as the
    picture itself would and at first taken from the noised ones, and how far these are from them. So a change
    shows as a difference at any noise level. adapter_*: attention of the trunk to the memory. num_queries:
    learned tokens after timestep and iteration. projector_dim, feature_dim: channels of the image's features
    inside and behind the projector; projector_upscale: rows and columns of features that a visual token
    becomes there. diffusion_*: the head that gives the velocity. edit_*: the head that marks and writes; this
    fraction of the cells may be written in one iteration. lora_rank: of the low-rank changes of the trunk, 0
    = none. words: what the byte tokenizer of an own trunk reads as one token each, in lower case. rewrites:
    whether an own trunk first says in words what a picture shows after what is asked of it, and all else goes
    by that instead of the instruction. image_first: whether a picture stands before the text of its prompt,
    so that prompts about one picture share what the trunk makes of it.
    """

    trunk: TrunkConfig = field(default_factory=lambda: TRUNKS["qwen3-vl-8b"])
    embeds_trunk: bool = False
    latent_channels: int = 128
    memory_dim: int = 1024
    memory_compares: bool = False
    adapter_dim: int = 2048
    adapter_head_dim: int = 128
    num_queries: int = 14
    time_dim: int = 1024
    projector_dim: int = 672
    feature_dim: int = 320
    projector_upscale: int = 1
    diffusion_dim: int = 2048
    diffusion_depth: int = 15
    diffusion_head_dim: int = 128
    diffusion_patch: int = 1
    edit_dim: int = 1024
    edit_depth: int = 2
    edit_head_dim: int = 128
    edit_fraction: float = 0.25
    lora_rank: int = 0
    lora_alpha: float = 32.0
    words: tuple[str, ...] = ()
    rewrites: bool = False
    image_first: bool = False

    def __post_init__(self) -> None:
        """Check every field. Raises: ConfigError."""
        check_trunk(self.trunk)
        for item in fields(self):
            value, least = getattr(self, item.name), 0 if item.name in ("num_queries", "lora_rank") else 1
            if item.name not in _NOT_SIZES and (not isinstance(value, int) or value < least):
                raise ConfigError(f"{item.name} must be a whole number of at least {least}, got {value!r}")
        for part in ("adapter", "diffusion", "edit"):
            width, head = getattr(self, f"{part}_dim"), getattr(self, f"{part}_head_dim")
            if width % head or head % 4:
                raise ConfigError(
                    f"{part}_dim must be a multiple of {part}_head_dim, and that of 4, got {width} and {head}"
                )
        for name in ("memory_dim", "diffusion_dim"):
            if getattr(self, name) % 4:
                raise ConfigError(f"{name} must be a multiple of 4, got {getattr(self, name)}")
        if self.diffusion_patch not in (1, 2):
            raise ConfigError(f"diffusion_patch must be 1 or 2, got {self.diffusion_patch}")
        if not 0 < self.edit_fraction <= 1:
            raise ConfigError(f"edit_fraction must lie above 0 and at most at 1, got {self.edit_fraction}")
        if self.rewrites and not self.embeds_trunk:
            raise ConfigError(
                "rewrites must be false for a trunk by reference, whose output layer is not loaded"
            )
        self._check_words()

    def _check_words(self) -> None:
        room = (
            int(self.trunk["text_config"]["vocab_size"]) - 256 - len(BYTE_TOKENS) if self.embeds_trunk else 0
        )
        if len(self.words) > room:
            raise ConfigError(f"words must be at most {room} for this trunk, got {len(self.words)}")
        for word in self.words:
            is_plain = isinstance(word, str) and word and word == "".join(word.lower().split())
            if not is_plain or self.words.count(word) > 1:
                raise ConfigError(f"words must be distinct, in lower case and without blanks, got {word!r}")

    @property
    def hidden_size(self) -> int:
        """Width of the trunk."""
        return int(self.trunk["text_config"]["hidden_size"])

    @property
    def num_layers(self) -> int:
        """Decoder layers of the trunk."""
        return int(self.trunk["text_config"]["num_hidden_layers"])

    @property
    def max_tokens(self) -> int:
        """Tokens that the trunk has positions for."""
        return int(self.trunk["text_config"]["max_position_embeddings"])

    @property
    def suffix_length(self) -> int:
        """Tokens that an iteration appends: timestep, iteration, queries."""
        return 2 + self.num_queries

    @property
    def adapter_layers(self) -> tuple[int, ...]:
        """Decoder layers with an adapter behind them: after each quarter of the trunk."""
        return tuple(self.num_layers * (j + 1) // NUM_ADAPTERS - 1 for j in range(NUM_ADAPTERS))

    @property
    def context_layers(self) -> tuple[int, ...]:
        """Decoder layers whose inputs the diffusion head reads: at a quarter, a half, three quarters."""
        return tuple(max(1, self.num_layers * i // 4) for i in (1, 2, 3))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ExoConfig":
        """Return the configuration of JSON-like values. `trunk` may be the name of a known one.

        Raises: ConfigError for an unknown key or a value out of range.
        """
        check_names(cls, values)
        trunk = values.get("trunk")
        if isinstance(trunk, str):
            if trunk not in TRUNKS:
                raise ConfigError(f"trunk must be one of {', '.join(TRUNKS)}, or settings, got {trunk!r}")
            values = {**values, "trunk": TRUNKS[trunk]}
        return cls(**{**values, "words": tuple(values.get("words", ()))})

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON-like values, the inverse of `from_dict`."""
        return asdict(self)


_TINY = ExoConfig(
    trunk=TRUNKS["tiny"],
    embeds_trunk=True,
    latent_channels=16,
    memory_dim=32,
    adapter_dim=32,
    adapter_head_dim=16,
    num_queries=6,
    time_dim=64,
    projector_dim=16,
    feature_dim=8,
    diffusion_dim=64,
    diffusion_depth=2,
    diffusion_head_dim=16,
    edit_dim=32,
    edit_depth=1,
    edit_head_dim=16,
)
_8B = ExoConfig(lora_rank=16)

PRESETS: Mapping[str, ExoConfig] = {
    "tiny": _TINY,
    "demo": replace(
        _TINY,
        trunk=TRUNKS["demo"],
        memory_dim=128,
        adapter_dim=128,
        adapter_head_dim=64,
        num_queries=14,
        time_dim=128,
        projector_dim=64,
        feature_dim=48,
        diffusion_dim=256,
        diffusion_depth=6,
        diffusion_head_dim=64,
        edit_dim=128,
        edit_head_dim=64,
    ),
    "small": replace(
        _TINY,
        trunk=TRUNKS["small"],
        memory_dim=192,
        adapter_dim=192,
        adapter_head_dim=64,
        num_queries=14,
        time_dim=256,
        projector_dim=96,
        feature_dim=64,
        diffusion_dim=384,
        diffusion_depth=8,
        diffusion_head_dim=64,
        edit_dim=192,
        edit_depth=2,
        edit_head_dim=64,
    ),
    "2b": replace(
        _8B,
        trunk=TRUNKS["qwen3-vl-2b"],
        memory_dim=768,
        adapter_dim=1024,
        diffusion_dim=1280,
        diffusion_depth=12,
        edit_dim=768,
    ),
    "4b": replace(
        _8B,
        trunk=TRUNKS["qwen3-vl-4b"],
        memory_dim=768,
        adapter_dim=1280,
        diffusion_dim=1536,
        diffusion_depth=14,
        edit_dim=768,
    ),
    "8b": _8B,
    "8b-literal": replace(_8B, latent_channels=16, adapter_dim=4096, num_queries=0),
}
"""2b, 4b, 8b: over the published trunks, by reference. 8b-literal: the description's own numbers, as far as
they exist together: latents of 64 x 64 x 16 (FLUX.1, unpacked, 512 px), no query tokens, wide adapters."""


def infer_config(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> ExoConfig:
    """Return the configuration that tensors with bare Exo names have.

    Shapes decide whatever they can. `flowcore.config` of the metadata gives the rest: the trunk's settings
    (without it the trunk is the known one of the same width and depth), edit_fraction, lora_alpha, words,
    rewrites, image_first.
    Raises: CheckpointError if a tensor that is needed is missing or has a shape no Exo model has.
    """
    reader = TensorReader(tensors, "Exo")
    stored = stored_config(metadata)
    adapters = sorted(reader.indices("adapters."))
    if len(adapters) != NUM_ADAPTERS:
        raise CheckpointError(f"an Exo checkpoint must hold {NUM_ADAPTERS} adapters, got {len(adapters)}")
    adapter = f"adapters.{adapters[0]}.attn"
    adapter_dim = reader.shape(f"{adapter}.q.weight", 2)[0]
    projector_dim, hidden = reader.shape("projector.inp.weight", 2)
    latent_channels, feature_dim = reader.shape("projector.out.weight", 4)[:2]
    diffusion_dim, _, patch, _ = reader.shape("diffusion_head.embed.weight", 4)
    upscaled = reader.shape("projector.conv2.weight", 4)[0]
    rank_key = reader.find(re.compile(r"lora\.layers\.0\.self_attn\.q_proj\.lora_A\.weight"))
    embedded = {name.removeprefix("trunk."): t for name, t in tensors.items() if name.startswith("trunk.")}
    trunk = _read_trunk(hidden, adapters[-1] + 1, embedded, stored)
    return ExoConfig.from_dict(
        {
            "trunk": trunk,
            "embeds_trunk": bool(embedded),
            "latent_channels": latent_channels,
            "memory_dim": reader.shape("memory.norm.weight", 1)[0],
            "memory_compares": "memory.compared.weight" in tensors,
            "adapter_dim": adapter_dim,
            "adapter_head_dim": reader.shape(f"{adapter}.q_norm.weight", 1)[0],
            "num_queries": reader.size("tokens.query", 0) or 0,
            "time_dim": reader.shape("tokens.timestep.fc1.weight", 2)[0],
            "projector_dim": projector_dim,
            "feature_dim": feature_dim,
            "projector_upscale": math.isqrt(upscaled // feature_dim),
            "diffusion_dim": diffusion_dim,
            "diffusion_depth": len(reader.indices("diffusion_head.blocks.")),
            "diffusion_head_dim": reader.shape("diffusion_head.blocks.0.attn.q_norm.weight", 1)[0],
            "diffusion_patch": patch,
            "edit_dim": reader.shape("edit_head.norm.weight", 1)[0],
            "edit_depth": len(reader.indices("edit_head.blocks.")),
            "edit_head_dim": reader.shape("edit_head.blocks.0.attn.q_norm.weight", 1)[0],
            "lora_rank": (reader.size(rank_key, 0) if rank_key else 0) or 0,
            **{name: stored[name] for name in _STORED if name in stored},
        }
    )


def _read_trunk(
    hidden: int, layers: int, embedded: Mapping[str, Tensor], stored: Mapping[str, Any]
) -> TrunkConfig:
    """Return the settings of the trunk; they must have the width and depth that the file's tensors have."""
    stated = stored.get("trunk")
    if isinstance(stated, str):
        stated = TRUNKS.get(stated)
    if embedded:
        return infer_trunk(embedded, stated)
    trunk: TrunkConfig | None = stated or find_trunk(hidden, layers)
    if trunk is None:
        raise CheckpointError(
            f"an Exo file for a trunk of width {hidden} and {layers} layers must state the trunk's settings "
            "in its metadata flowcore.config, got none there; a published trunk needs none"
        )
    text = trunk["text_config"]
    if (text["hidden_size"], text["num_hidden_layers"]) != (hidden, layers):
        raise CheckpointError(
            f"the trunk in flowcore.config must have the file's width {hidden} and {layers} layers, got "
            f"{text['hidden_size']} and {text['num_hidden_layers']}"
        )
    return trunk


def is_match(keys: Collection[str]) -> bool:
    """Return whether bare tensor names are those of an Exo model."""
    return "tokens.iteration.weight" in keys and "edit_head.mask.weight" in keys
