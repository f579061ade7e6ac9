"""Sizes and switches of Flux, its presets, and how to read them back from a checkpoint's tensors.

Source: Souymodip/flux_core, README (`readme`) and default_config.py; black-forest-labs/flux, util.py.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from torch import Tensor

from ...errors import CheckpointError, ConfigError
from ...layers.reading import TensorReader, check_names, stored_config


@dataclass(frozen=True, slots=True, kw_only=True)
class FluxConfig:
    """Everything that decides the parameters and the arithmetic of a Flux model.

    in_channels, context_in_dim, vec_in_dim: widths of a data token, a condition token and the vector y.
    out_channels may differ from in_channels: FLUX.1's control models take further channels in.
    axes_dim: channels of a head that turn with each axis of the positions. qkv_bias: of the double blocks;
    single blocks always have one. pooled_from_text: without y the mean of the condition tokens stands in, for
    text encoders that give none; the originals leave y out.
    """

    in_channels: int
    out_channels: int
    vec_in_dim: int
    context_in_dim: int
    hidden_size: int
    num_heads: int
    mlp_ratio: float = 4.0
    depth: int
    depth_single_blocks: int
    axes_dim: tuple[int, ...]
    theta: float = 10_000
    qkv_bias: bool = True
    guidance_embed: bool = False
    pooled_from_text: bool = False

    def __post_init__(self) -> None:
        """Check every field. Raises: ConfigError."""
        for name, least in _LEAST.items():
            if getattr(self, name) < least:
                raise ConfigError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.depth + self.depth_single_blocks == 0:
            raise ConfigError("depth and depth_single_blocks must not both be 0, got 0 and 0")
        if self.hidden_size % self.num_heads:
            raise ConfigError(
                f"hidden_size must be a multiple of num_heads = {self.num_heads}, got {self.hidden_size}"
            )
        if any(width < 2 or width % 2 for width in self.axes_dim):
            raise ConfigError(f"every entry of axes_dim must be even, got {list(self.axes_dim)}")
        if sum(self.axes_dim) != self.head_dim:
            raise ConfigError(
                f"axes_dim must add up to the head width hidden_size / num_heads = {self.head_dim}, "
                f"got {list(self.axes_dim)} with sum {sum(self.axes_dim)}"
            )
        if self.theta <= 0:
            raise ConfigError(f"theta must be positive, got {self.theta}")
        if self.pooled_from_text and self.vec_in_dim != self.context_in_dim:
            raise ConfigError(
                f"vec_in_dim must be context_in_dim = {self.context_in_dim} with pooled_from_text, "
                f"got {self.vec_in_dim}"
            )

    @property
    def head_dim(self) -> int:
        """Width of an attention head."""
        return self.hidden_size // self.num_heads

    @property
    def mlp_dim(self) -> int:
        """Width of the hidden layer of a feed-forward."""
        return int(self.hidden_size * self.mlp_ratio)

    @property
    def needs_y(self) -> bool:
        """Whether the sizes are FLUX.1's: its weights were never trained without the vector y."""
        sizes = (self.hidden_size, self.context_in_dim, self.vec_in_dim)
        return sizes == (_FLUX1.hidden_size, _FLUX1.context_in_dim, _FLUX1.vec_in_dim)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "FluxConfig":
        """Return the configuration of JSON-like values, `axes_dim` as a list.

        Raises: ConfigError for an unknown key, a missing one, or a value out of range.
        """
        check_names(cls, values)
        missing = [field.name for field in fields(cls) if field.name not in {*values, *_DEFAULTED}]
        if missing:
            raise ConfigError(
                f"a Flux configuration must state {', '.join(missing)}, got {', '.join(values)}"
            )
        for name, value in values.items():
            is_list = isinstance(value, list | tuple)
            numbers = value if is_list else [value]
            kind, what = (float, "finite") if name in ("mlp_ratio", "theta") else (int, "whole")
            is_usable = all(isinstance(n, int | kind) and math.isfinite(n) for n in numbers)
            if not is_usable or is_list != (name == "axes_dim"):
                raise ConfigError(f"{name} must be a {what} number (axes_dim a list of them), got {value!r}")
        return cls(**{**values, "axes_dim": tuple(values["axes_dim"])})

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON-like values, the inverse of `from_dict`."""
        return {**asdict(self), "axes_dim": list(self.axes_dim)}


_LEAST = {
    "in_channels": 1,
    "out_channels": 1,
    "vec_in_dim": 1,
    "context_in_dim": 1,
    "hidden_size": 1,
    "num_heads": 1,
    "mlp_dim": 1,
    "depth": 0,
    "depth_single_blocks": 0,
}
_DEFAULTED = ("mlp_ratio", "theta", "qkv_bias", "guidance_embed", "pooled_from_text")

_FLUX1 = FluxConfig(
    in_channels=64,
    out_channels=64,
    vec_in_dim=768,
    context_in_dim=4096,
    hidden_size=3072,
    num_heads=24,
    depth=19,
    depth_single_blocks=38,
    axes_dim=(16, 56, 56),
)
_DEV = replace(_FLUX1, guidance_embed=True)
_CONTROL = replace(_DEV, in_channels=128)

PRESETS: Mapping[str, FluxConfig] = {
    "tiny": FluxConfig(
        in_channels=16,
        out_channels=16,
        vec_in_dim=32,
        context_in_dim=32,
        hidden_size=48,
        num_heads=3,
        depth=1,
        depth_single_blocks=2,
        axes_dim=(4, 6, 6),
        pooled_from_text=True,
    ),
    "points": FluxConfig(
        in_channels=2,
        out_channels=2,
        vec_in_dim=4,
        context_in_dim=4,
        hidden_size=48,
        num_heads=3,
        depth=2,
        depth_single_blocks=2,
        axes_dim=(8, 8),
        theta=100,
    ),
    "demo": FluxConfig(
        in_channels=64,
        out_channels=64,
        vec_in_dim=128,
        context_in_dim=128,
        hidden_size=128,
        num_heads=4,
        depth=2,
        depth_single_blocks=4,
        axes_dim=(8, 12, 12),
        pooled_from_text=True,
    ),
    "readme": FluxConfig(
        in_channels=2,
        out_channels=2,
        vec_in_dim=4,
        context_in_dim=4,
        hidden_size=1024,
        num_heads=8,
        depth=2,
        depth_single_blocks=4,
        axes_dim=(16, 56, 56),
    ),
    "flux-dev": _DEV,
    "flux-schnell": _FLUX1,
    "flux-dev-canny": _CONTROL,
    "flux-dev-canny-lora": _CONTROL,
    "flux-dev-depth": _CONTROL,
    "flux-dev-depth-lora": _CONTROL,
    "flux-dev-fill": replace(_DEV, in_channels=384),
}
"""tiny, demo: latents of 4 and of 16 channels, 2 x 2 of them a token. points: sequences of points, with two
position axes. readme: the example of Flux Core. Kontext, Krea and Redux are flux-dev; `-lora`: the model
with its LoRA merged."""


def infer_config(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> FluxConfig:
    """Return the configuration that tensors with bare Flux names have.

    Shapes decide whatever they can. `axes_dim` and `theta` are read from `flowcore.config` of the metadata,
    which may also hold the config.json of diffusers; without it they are FLUX.1's if heads are 128 wide.
    Raises: CheckpointError if a tensor that is needed is missing or has a shape no Flux model has, or if
    nothing tells `axes_dim`.
    """
    reader = TensorReader(tensors, "flux")
    hidden_size, in_channels = reader.shape("img_in.weight", axes=2)
    stored = stored_config(metadata)
    depth, depth_single = (_count(reader.indices(f"{kind}_blocks.")) for kind in ("double", "single"))
    norm = "double_blocks.0.img_attn.norm" if depth else "single_blocks.0.norm"
    (head_dim,) = reader.shape(f"{norm}.query_norm.scale", axes=1)
    if depth:
        mlp_dim = reader.shape("double_blocks.0.img_mlp.0.weight", axes=2)[0]
    else:
        mlp_dim = reader.shape("single_blocks.0.linear1.weight", axes=2)[0] - 3 * hidden_size
    if hidden_size % head_dim:
        raise CheckpointError(
            f"heads of a flux checkpoint must divide its width {hidden_size}, got {head_dim} channels a head"
        )
    return FluxConfig.from_dict(
        {
            "in_channels": in_channels,
            "out_channels": reader.shape("final_layer.linear.weight", axes=2)[0],
            "vec_in_dim": reader.shape("vector_in.in_layer.weight", axes=2)[1],
            "context_in_dim": reader.shape("txt_in.weight", axes=2)[1],
            "hidden_size": hidden_size,
            "num_heads": hidden_size // head_dim,
            "mlp_ratio": _mlp_ratio(mlp_dim, hidden_size, stored.get("mlp_ratio")),
            "depth": depth,
            "depth_single_blocks": depth_single,
            "axes_dim": _axes_dim(stored, head_dim),
            "theta": stored.get("theta", _FLUX1.theta),
            "qkv_bias": "double_blocks.0.img_attn.qkv.bias" in tensors
            if depth
            else stored.get("qkv_bias", True),
            "guidance_embed": "guidance_in.in_layer.weight" in tensors,
            "pooled_from_text": stored.get("pooled_from_text", False),
        }
    )


def _count(indices: set[int]) -> int:
    return 1 + max(indices, default=-1)


def _axes_dim(stored: Mapping[str, Any], head_dim: int) -> Any:  # noqa: ANN401 - checked by the caller
    """Return the split of a head among the position axes, which no tensor tells."""
    for name in ("axes_dim", "axes_dims_rope"):  # the second is diffusers'
        if name in stored:
            return stored[name]
    if head_dim == _FLUX1.head_dim:
        return _FLUX1.axes_dim
    raise CheckpointError(
        f"metadata flowcore.config must state axes_dim for heads of {head_dim} channels, got none; "
        "add the configuration that the model was trained with"
    )


def _mlp_ratio(mlp_dim: int, hidden_size: int, stored: object) -> float:
    """Return a ratio that gives the width under the reference's rounding down: the stored one if it does."""
    if isinstance(stored, int | float) and hidden_size * stored // 1 == mlp_dim:
        return stored
    ratio = mlp_dim / hidden_size
    return ratio if int(hidden_size * ratio) == mlp_dim else math.nextafter(ratio, math.inf)


def is_match(keys: Collection[str]) -> bool:
    """Return whether bare tensor names are those of a Flux model."""
    norms = ("double_blocks.0.img_attn.norm.key_norm.scale", "single_blocks.0.norm.key_norm.scale")
    return "img_in.weight" in keys and any(norm in keys for norm in norms)
