"""Sizes and switches of XUT, its presets, and how to read them back from a checkpoint's tensors.

Source: KohakuBlueleaf/HDM (names, defaults); MK040412/Ouroboros (`residual`, `skip_source`, `ln_eps`).
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, get_args

from torch import Tensor

from ...errors import ConfigError
from ...layers.reading import TensorReader, check_names, stored_config

Residual = Literal["normed", "prenorm"]
SkipSource = Literal["encoder", "self"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TreadConfig:
    """Token routing: plain blocks before and after the backbone, and the share that training drops."""

    prev_trns_depth: int
    post_trns_depth: int
    dropout_ratio: float

    def __post_init__(self) -> None:
        """Check ranges. Raises: ConfigError."""
        for name in ("prev_trns_depth", "post_trns_depth"):
            if getattr(self, name) < 0:
                raise ConfigError(f"tread_config.{name} must be at least 0, got {getattr(self, name)}")
        if not 0 <= self.dropout_ratio < 1:
            raise ConfigError(f"tread_config.dropout_ratio must be in [0, 1), got {self.dropout_ratio}")


@dataclass(frozen=True, slots=True, kw_only=True)
class XUTConfig:
    """Everything that decides the parameters and the arithmetic of a XUT model; defaults are the reference's.

    residual: `normed` keeps the normalised, modulated stream as the residual (reference); `prenorm` keeps the
    stream itself (JAX port). skip_source: what the first block of a decoder stage cross-attends to, the
    `encoder`'s output (reference) or the stream it`self` (JAX port).
    """

    patch_size: int = 2
    input_dim: int = 4
    dim: int = 1024
    ctx_dim: int | None = 1024
    ctx_size: int = 256
    heads: int = 16
    dim_head: int = 64
    mlp_dim: int = 3072
    depth: int = 8
    enc_blocks: int | tuple[int, ...] = 1
    dec_blocks: int | tuple[int, ...] = 2
    dec_ctx: bool = False
    class_cond: int = 0
    shared_adaln: bool = True
    concat_ctx: bool = True
    use_dyt: bool = False
    double_t: bool = False
    addon_info_embs_dim: int | None = None
    tread_config: TreadConfig | None = None
    residual: Residual = "normed"
    skip_source: SkipSource = "encoder"
    ln_eps: float = 1e-5

    def __post_init__(self) -> None:
        """Check every field. Raises: ConfigError."""
        for name in ("patch_size", "input_dim", "dim", "heads", "dim_head", "mlp_dim", "depth"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.heads * self.dim_head != self.dim:
            raise ConfigError(
                f"dim must be heads * dim_head = {self.heads * self.dim_head}, got {self.dim} with "
                f"{self.heads} heads of {self.dim_head}"
            )
        if self.residual not in get_args(Residual):
            raise ConfigError(f"residual must be one of {get_args(Residual)}, got {self.residual!r}")
        if self.skip_source not in get_args(SkipSource):
            raise ConfigError(f"skip_source must be one of {get_args(SkipSource)}, got {self.skip_source!r}")
        _check_counts("enc_blocks", self.enc_block_counts, self.depth, least=0)
        _check_counts("dec_blocks", self.dec_block_counts, self.depth, least=1)

    @property
    def enc_block_counts(self) -> tuple[int, ...]:
        """Blocks of each encoder stage."""
        return _spread(self.enc_blocks, self.depth)

    @property
    def dec_block_counts(self) -> tuple[int, ...]:
        """Blocks of each decoder stage."""
        return _spread(self.dec_blocks, self.depth)

    @property
    def cross_ctx_dim(self) -> int | None:
        """Width of the text that blocks cross-attend to; None when text is appended or absent."""
        return None if self.concat_ctx else self.ctx_dim

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "XUTConfig":
        """Return the configuration of JSON-like values: lists for block counts, a mapping for `tread_config`.

        Raises: ConfigError for an unknown key or a value out of range.
        """
        known = {**values}
        check_names(cls, known)
        for name in ("enc_blocks", "dec_blocks"):
            if isinstance(known.get(name), list):
                known[name] = tuple(known[name])
        tread = known.get("tread_config")
        if isinstance(tread, Mapping):
            check_names(TreadConfig, tread, "tread_config.")
            missing = {field.name for field in fields(TreadConfig)} - set(tread)
            if missing:
                raise ConfigError(f"tread_config must have {sorted(missing)}, got {sorted(tread)}")
            known["tread_config"] = TreadConfig(**tread)
        return cls(**known)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON-like values, the inverse of `from_dict`."""
        return asdict(self)


def _spread(blocks: int | tuple[int, ...], depth: int) -> tuple[int, ...]:
    return (blocks,) * depth if isinstance(blocks, int) else blocks


def _check_counts(name: str, counts: tuple[int, ...], depth: int, least: int) -> None:
    if len(counts) != depth:
        raise ConfigError(f"{name} must have one entry for each of depth = {depth} stages, got {len(counts)}")
    if min(counts) < least:
        raise ConfigError(f"{name} must be at least {least} in every stage, got {min(counts)}")


_SMALL = XUTConfig(dim=896, ctx_dim=640, heads=14, mlp_dim=3072, depth=4)
_LARGE = XUTConfig(dim=1280, ctx_dim=640, heads=10, dim_head=128, mlp_dim=4096, depth=4, dec_blocks=3)
_HDM_TREAD = TreadConfig(prev_trns_depth=1, post_trns_depth=3, dropout_ratio=0.5)

PRESETS: Mapping[str, XUTConfig] = {
    "tiny": XUTConfig(
        dim=64,
        ctx_dim=32,
        ctx_size=32,
        heads=4,
        dim_head=16,
        mlp_dim=128,
        depth=2,
        tread_config=TreadConfig(prev_trns_depth=1, post_trns_depth=1, dropout_ratio=0.0),
    ),
    "demo": XUTConfig(
        input_dim=16,
        dim=128,
        ctx_dim=128,
        ctx_size=64,
        heads=4,
        dim_head=32,
        mlp_dim=384,
        depth=2,
        dec_blocks=2,
    ),
    "xut-small": _SMALL,
    "xut-large-640": _LARGE,
    "hdm-xut-small": replace(_SMALL, addon_info_embs_dim=1, tread_config=_HDM_TREAD),
    "hdm-xut-340m": XUTConfig(depth=4, dec_blocks=3, addon_info_embs_dim=1, tread_config=_HDM_TREAD),
    "hdm-xut-large": replace(_LARGE, ctx_dim=1152, addon_info_embs_dim=1, tread_config=_HDM_TREAD),
}
"""xut-small, xut-large-640: the sizes of the JAX port. hdm-*: those of the HDM report; 340m is published."""


def infer_config(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> XUTConfig:
    """Return the configuration that tensors with bare XUT names have.

    Shapes decide whatever they can. `flowcore.config` of the metadata is asked only for the rest (context
    size, routing rate, `residual`, `skip_source`, `ln_eps`); without it those have the reference's defaults.
    Raises: CheckpointError if a tensor that is needed is missing or has a shape no XUT model has.
    """
    reader = _Reader(tensors, "XUT")
    dim, input_dim, patch_size, _ = reader.shape("in_patch.proj.weight", axes=4)
    first = "backbone.dec_blocks.0.0"  # the only block that every XUT model has
    heads = reader.shape(f"{first}.attn.rope.freqs", axes=3)[0]
    stored = stored_config(metadata)
    text_key = reader.find(_TEXT_ATTENTION)
    return XUTConfig.from_dict(
        {
            "patch_size": patch_size,
            "input_dim": input_dim,
            "dim": dim,
            "ctx_dim": reader.size(text_key or "ctx_proj.weight", 1),
            "heads": heads,
            "dim_head": dim // heads,
            "mlp_dim": reader.shape(f"{first}.mlp.w3.weight", axes=2)[1],
            "depth": reader.depth(),
            "enc_blocks": reader.block_counts("enc_blocks"),
            "dec_blocks": reader.block_counts("dec_blocks"),
            "dec_ctx": reader.find(_DECODER_TEXT_ATTENTION) is not None,
            "class_cond": reader.size("class_token.weight", 0) or 0,
            "shared_adaln": "shared_adaln_attn.0.weight" in tensors,
            "concat_ctx": text_key is None,
            "use_dyt": f"{first}.attn_pre_norm.norm.in_weight" in tensors,
            "double_t": "r_emb.proj.0.weight" in tensors,
            "addon_info_embs_dim": reader.size("addon_info_embs_proj.0.weight", 1),
            "tread_config": reader.tread(stored),
            **{name: stored[name] for name in _NOT_IN_SHAPES if name in stored},
        }
    )


_NOT_IN_SHAPES = ("ctx_size", "residual", "skip_source", "ln_eps")
_DECODER_TEXT_ATTENTION = re.compile(r"backbone\.dec_blocks\.\d+\.[1-9]\d*\.xattn\.kv\.weight")
_TEXT_ATTENTION = re.compile(
    r"(backbone\.enc_blocks\.\d+|(prev|post)_tread_trns\.blocks)\.\d+\.xattn\.kv\.weight"
)


class _Reader(TensorReader):
    """Reads what only XUT has."""

    def depth(self) -> int:
        """Stages of the decoder; an encoder stage without blocks leaves no names."""
        return 1 + max(self.indices("backbone.dec_blocks."))

    def block_counts(self, side: str) -> int | tuple[int, ...]:
        """Blocks of each stage, one number if all are equal."""
        counts = tuple(len(self.indices(f"backbone.{side}.{stage}.")) for stage in range(self.depth()))
        return counts[0] if len(set(counts)) == 1 else counts

    def tread(self, stored: Mapping[str, Any]) -> dict[str, Any] | None:
        """Routing settings, or None without routing blocks."""
        before, after = (len(self.indices(f"{side}_tread_trns.blocks.")) for side in ("prev", "post"))
        if not before and not after:
            return None
        ratio = (stored.get("tread_config") or {}).get("dropout_ratio", 0.5)
        return {"prev_trns_depth": before, "post_trns_depth": after, "dropout_ratio": ratio}


def is_match(keys: Collection[str]) -> bool:
    """Return whether bare tensor names are those of a XUT model."""
    return "in_patch.proj.weight" in keys and "backbone.dec_blocks.0.0.attn.qkv.weight" in keys
