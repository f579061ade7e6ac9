"""Sizes and switches of TinyFlux, its presets, and how to read them back from a checkpoint's tensors.

Source: AbstractEyes/tiny-flux, config of version 4.2, and those of 3 and 4.1, which older files carry.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from torch import Tensor

from ...errors import CheckpointError, ConfigError
from ...layers.reading import TensorReader, check_names, stored_config

_DEFAULT_AXES = (16, 56, 56)


@dataclass(frozen=True, slots=True, kw_only=True)
class TinyFluxConfig:
    """Everything that decides the parameters and the arithmetic of a TinyFlux model; defaults are 4.2's.

    patch_size: latent cells a side of a token, 1 in published models. axes_dims_rope: channels of a head
    that turn with each axis of the positions. lune_dropout: inside the predictor, in training.
    sol_geometric_weight: start of the gate between formula and prediction. freeze_*: leaves a predictor out
    of training. guidance_embeds: the embedder of versions up to 4.1. sol_qk_scale: the layer that published
    files own and no forward uses. pooled_from_text: without a pooled vector the mean of the text tokens
    stands in, for text encoders that give none.
    """

    hidden_size: int = 512
    num_attention_heads: int = 4
    attention_head_dim: int = 128
    in_channels: int = 16
    patch_size: int = 1
    joint_attention_dim: int = 768
    pooled_projection_dim: int = 768
    num_double_layers: int = 15
    num_single_layers: int = 25
    mlp_ratio: float = 4.0
    axes_dims_rope: tuple[int, ...] = _DEFAULT_AXES
    use_lune_expert: bool = True
    lune_expert_dim: int = 1280
    lune_hidden_dim: int = 512
    lune_dropout: float = 0.1
    freeze_lune: bool = False
    use_sol_prior: bool = True
    sol_spatial_size: int = 8
    sol_hidden_dim: int = 256
    sol_geometric_weight: float = 0.7
    freeze_sol: bool = False
    use_t5_vec: bool = True
    guidance_embeds: bool = False
    sol_qk_scale: bool = True
    pooled_from_text: bool = False

    def __post_init__(self) -> None:
        """Check every field. Raises: ConfigError."""
        for name in _AT_LEAST_ONE:
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.num_attention_heads * self.attention_head_dim != self.hidden_size:
            raise ConfigError(
                "hidden_size must be num_attention_heads * attention_head_dim = "
                f"{self.num_attention_heads * self.attention_head_dim}, got {self.hidden_size} with "
                f"{self.num_attention_heads} heads of {self.attention_head_dim}"
            )
        if len(self.axes_dims_rope) != 3 or any(size < 2 or size % 2 for size in self.axes_dims_rope):
            raise ConfigError(f"axes_dims_rope must be three even sizes, got {list(self.axes_dims_rope)}")
        if sum(self.axes_dims_rope) != self.attention_head_dim:
            raise ConfigError(
                f"axes_dims_rope must add up to attention_head_dim = {self.attention_head_dim}, got "
                f"{list(self.axes_dims_rope)} with sum {sum(self.axes_dims_rope)}"
            )
        if not 0 <= self.lune_dropout < 1:
            raise ConfigError(f"lune_dropout must be in [0, 1), got {self.lune_dropout}")
        if not 0 <= self.sol_geometric_weight <= 1:
            raise ConfigError(f"sol_geometric_weight must be in [0, 1], got {self.sol_geometric_weight}")
        if self.pooled_from_text and self.joint_attention_dim != self.pooled_projection_dim:
            raise ConfigError(
                f"pooled_projection_dim must be joint_attention_dim = {self.joint_attention_dim} with "
                f"pooled_from_text, got {self.pooled_projection_dim}"
            )

    @property
    def token_dim(self) -> int:
        """Numbers in a token of the image."""
        return self.in_channels * self.patch_size**2

    @property
    def mlp_dim(self) -> int:
        """Width of the hidden layer of a feed-forward."""
        return int(self.hidden_size * self.mlp_ratio)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "TinyFluxConfig":
        """Return the configuration of JSON-like values, `axes_dims_rope` as a list.

        Raises: ConfigError for an unknown key or a value out of range.
        """
        check_names(cls, values)
        axes = tuple(values.get("axes_dims_rope", _DEFAULT_AXES))
        return cls(**{**values, "axes_dims_rope": axes})

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON-like values, the inverse of `from_dict`."""
        return {**asdict(self), "axes_dims_rope": list(self.axes_dims_rope)}


_AT_LEAST_ONE = (
    "hidden_size",
    "num_attention_heads",
    "attention_head_dim",
    "in_channels",
    "patch_size",
    "joint_attention_dim",
    "pooled_projection_dim",
    "num_double_layers",
    "num_single_layers",
    "mlp_dim",
    "lune_expert_dim",
    "lune_hidden_dim",
    "sol_spatial_size",
    "sol_hidden_dim",
)

_DEEP = TinyFluxConfig()

PRESETS: Mapping[str, TinyFluxConfig] = {
    "tiny": TinyFluxConfig(
        hidden_size=64,
        num_attention_heads=2,
        attention_head_dim=32,
        in_channels=4,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        num_double_layers=1,
        num_single_layers=2,
        axes_dims_rope=(8, 12, 12),
        lune_expert_dim=64,
        lune_hidden_dim=32,
        lune_dropout=0.0,
        sol_spatial_size=4,
        sol_hidden_dim=16,
        sol_qk_scale=False,
        pooled_from_text=True,
    ),
    "demo": TinyFluxConfig(
        hidden_size=128,
        num_attention_heads=4,
        attention_head_dim=32,
        patch_size=2,
        joint_attention_dim=128,
        pooled_projection_dim=128,
        num_double_layers=2,
        num_single_layers=4,
        axes_dims_rope=(8, 12, 12),
        lune_expert_dim=128,
        lune_hidden_dim=64,
        lune_dropout=0.0,
        sol_hidden_dim=32,
        sol_qk_scale=False,
        pooled_from_text=True,
    ),
    "tinyflux-deep": _DEEP,
    "tinyflux-deep-v3": replace(_DEEP, use_sol_prior=False, use_t5_vec=False),
}
"""tinyflux-deep: version 4.2, also what 4.1 files hold. tinyflux-deep-v3: the sizes of version 3."""


def published_config(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that a published config.json states, of whichever version, under today's names.

    Unknown keys and `_metadata` are dropped. Versions up to 4.1 name Lune an expert predictor; 4.1 reads a
    file that switches Lune off and leaves the expert predictor on as one with Lune and the expert's sizes.
    """
    known = {field.name for field in fields(TinyFluxConfig)}
    found = {name: value for name, value in values.items() if name in known}
    if "use_expert_predictor" not in values:
        return found
    has_lune = found.get("use_lune_expert", False)
    if not has_lune and values["use_expert_predictor"]:
        found["use_lune_expert"] = True
        old = {"expert_dim": "lune_expert_dim", "expert_hidden_dim": "lune_hidden_dim"}
        old["expert_dropout"] = "lune_dropout"
        found.update({new: values[name] for name, new in old.items() if name in values})
    if "use_sol_prior" not in values:  # version 3 knows neither, and embeds guidance only without an expert
        has_expert = bool(values["use_expert_predictor"])
        found |= {"use_lune_expert": has_expert, "use_sol_prior": False, "use_t5_vec": False}
        found["guidance_embeds"] = not has_expert and found.get("guidance_embeds", False)
    return found


def config_differences(config: TinyFluxConfig, values: Mapping[str, Any]) -> list[str]:
    """Return in words where a config.json states something else than a file's tensors; empty if it agrees.

    Sizes of parts that the model does not have are not compared.
    """
    absent: tuple[str, ...] = ()
    absent += () if config.use_lune_expert else ("lune_",)
    absent += () if config.use_sol_prior else ("sol_",)
    stated = published_config(values)
    return [
        f"{name} is {actual}, stated {stated[name]}"
        for name, actual in config.to_dict().items()
        if name in stated and _plain(stated[name]) != actual and not name.startswith(absent)
    ]


def _plain(value: Any) -> Any:  # noqa: ANN401 - a JSON value
    return list(value) if isinstance(value, tuple) else value


def is_match(keys: Collection[str]) -> bool:
    """Return whether bare tensor names are those of a TinyFlux model of any version."""
    marks = ("double_blocks.0.attn.txt_qkv.weight", "single_blocks.0.attn.qkv.weight", "vector_in.1.weight")
    return all(mark in keys for mark in marks)


def is_version_1(tensors: Mapping[str, Tensor]) -> bool:
    """Return whether tensors with bare names are TinyFlux 1's: 256 wide, guidance, no frequencies."""
    width = tensors["img_in.weight"].shape[0] if "img_in.weight" in tensors else 0
    return width == 256 and "guidance_in.mlp.0.weight" in tensors and "rope.freqs_0" not in tensors


def infer_config(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> TinyFluxConfig:
    """Return the configuration that tensors with bare TinyFlux names have.

    Shapes decide whatever they can. `flowcore.config` of the metadata, which may also hold the config.json
    of any version, is asked for the rest: dropout, starting values, what is frozen, `pooled_from_text`,
    `patch_size`, and the position axes of files without frequencies.
    Raises: CheckpointError if a tensor that is needed is missing or has a shape no TinyFlux model has, and
        for version 1, whose arithmetic is another one.
    """
    if is_version_1(tensors):
        raise CheckpointError(
            "the tensors must be those of TinyFlux 2 or later, got TinyFlux 1, whose text keys are all zero; "
            "use a tiny-flux-deep file"
        )
    return read_config(tensors, published_config(stored_config(metadata)))


def read_config(tensors: Mapping[str, Tensor], stored: Mapping[str, Any]) -> TinyFluxConfig:
    """Return the configuration of tensors of any version; `stored` fields hold where shapes do not tell."""
    reader = TensorReader(tensors, "tinyflux")
    hidden_size, token_dim = reader.shape("img_in.weight", axes=2)
    axes = _axes(reader, stored)
    heads = hidden_size // sum(axes)
    _check_heads(reader, heads)
    values = {
        **stored,
        "hidden_size": hidden_size,
        "num_attention_heads": heads,
        "attention_head_dim": sum(axes),
        "in_channels": _channels(token_dim, stored.get("patch_size", 1)),
        "joint_attention_dim": reader.shape("txt_in.weight", axes=2)[1],
        "pooled_projection_dim": reader.shape("vector_in.1.weight", axes=2)[1],
        "num_double_layers": 1 + max(reader.indices("double_blocks.")),
        "num_single_layers": 1 + max(reader.indices("single_blocks.")),
        "mlp_ratio": _mlp_ratio(
            reader.shape("single_blocks.0.mlp.fc1.weight", axes=2)[0],
            hidden_size,
            stored.get("mlp_ratio", 4.0),
        ),
        "axes_dims_rope": axes,
        "use_lune_expert": _has(tensors, "lune_predictor."),
        "use_sol_prior": _has(tensors, "sol_prior."),
        "use_t5_vec": _has(tensors, "t5_pool."),
        "guidance_embeds": _has(tensors, "guidance_in."),
    }
    if values["use_lune_expert"]:
        expert_dim, lune_hidden_dim = reader.shape("lune_predictor.predictor.6.weight", axes=2)
        values |= {"lune_expert_dim": expert_dim, "lune_hidden_dim": lune_hidden_dim}
    if values["use_sol_prior"]:
        values["sol_qk_scale"] = _has(tensors, "sol_prior.spatial_to_qk_scale.")
        values["sol_hidden_dim"] = reader.shape("sol_prior.stat_predictor.0.weight", axes=2)[0]
        values["sol_spatial_size"] = _side(reader.shape("sol_prior.spatial_predictor.4.weight", axes=2)[0])
    return TinyFluxConfig.from_dict(values)


def _has(keys: Collection[str], prefix: str) -> bool:
    return any(key.startswith(prefix) for key in keys)


def _axes(reader: TensorReader, stored: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the channels that turn with each axis: by the frequencies, else as stated, else the default."""
    if "rope.freqs_0" in reader.tensors:
        return tuple(2 * reader.shape(f"rope.freqs_{axis}", axes=1)[0] for axis in range(3))
    return tuple(stored.get("axes_dims_rope", _DEFAULT_AXES))


def _check_heads(reader: TensorReader, heads: int) -> None:
    """Compare the number of heads with what the modulation of attention says, where it is there."""
    rows = reader.size("double_blocks.0.attn.spatial_to_mod.weight", 0)
    if rows is not None and rows != heads:
        raise CheckpointError(
            f"double_blocks.0.attn.spatial_to_mod.weight must have a row for each of {heads} heads, got "
            f"{rows}; without rope.freqs_* the metadata must state axes_dims_rope"
        )


def _channels(token_dim: int, patch_size: object) -> int:
    """Return the channels of a latent cell in tokens of token_dim numbers."""
    if not (isinstance(patch_size, int) and patch_size > 0 and token_dim % patch_size**2 == 0):
        raise CheckpointError(
            f"img_in.weight must take in_channels * patch_size^2 numbers, got {token_dim} with patch_size "
            f"{patch_size!r}; correct patch_size in metadata flowcore.config"
        )
    return token_dim // patch_size**2


def _mlp_ratio(mlp_dim: int, hidden_size: int, stated: float) -> float:
    """Return the ratio that gives the width under the reference's rounding down, stated if it does."""
    if int(hidden_size * stated) == mlp_dim:
        return stated
    ratio = mlp_dim / hidden_size
    return ratio if int(hidden_size * ratio) == mlp_dim else math.nextafter(ratio, math.inf)


def _side(cells: int) -> int:
    side = math.isqrt(cells)
    if side * side != cells:
        raise CheckpointError(f"sol_prior.spatial_predictor.4.weight must have a square of rows, got {cells}")
    return side
