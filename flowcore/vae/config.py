"""Settings of diffusers' AutoencoderKL: read from a file's metadata, or inferred from its tensors.

Those of FLUX.2's autoencoder are the same and `batch_norm_eps`, which only it has.
"""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..errors import CheckpointError, ConfigError
from .latent_spec import LatentGrid

FIELDS = frozenset(
    {
        "in_channels",
        "out_channels",
        "down_block_types",
        "up_block_types",
        "block_out_channels",
        "layers_per_block",
        "act_fn",
        "latent_channels",
        "norm_num_groups",
        "sample_size",
        "scaling_factor",
        "shift_factor",
        "latents_mean",
        "latents_std",
        "force_upcast",
        "use_quant_conv",
        "use_post_quant_conv",
        "mid_block_add_attention",
        "batch_norm_eps",
    }
)
FLUX2_CLASS = "AutoencoderKLFlux2"
FLUX2_PATCH = 2
FLUX2_EPS = 1e-4
# What else the settings of FLUX.2's class hold, and the values that the network here has.
_FLUX2_FIXED = {
    "patch_size": ([FLUX2_PATCH, FLUX2_PATCH],),
    "batch_norm_momentum": (0.1,),
    "decoder_block_out_channels": (None,),
}


def checked_config(values: Mapping[str, Any], *, source: str) -> dict[str, Any]:
    """Return the settings without the library's own notes (keys that start with `_`).

    Raises: ConfigError if the class is another one, or a key is unknown.
    """
    name = values.get("_class_name", "AutoencoderKL")
    if name not in ("AutoencoderKL", FLUX2_CLASS):
        raise ConfigError(
            f"the class of {source} must be AutoencoderKL or {FLUX2_CLASS}, got {name}; pass another VAE"
        )
    config = {key: value for key, value in values.items() if not key.startswith("_")}
    if name == FLUX2_CLASS:
        config = _flux2_config(config, source)
    unknown = sorted(set(config) - FIELDS)
    if unknown:
        raise ConfigError(
            f"keys of the VAE config in {source} must be AutoencoderKL settings, got {unknown[:5]}"
        )
    return config


def _flux2_config(values: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Return the settings of FLUX.2's class without those that are the same in all its files."""
    for key, known in _FLUX2_FIXED.items():
        value = values.get(key, known[0])
        value = list(value) if isinstance(value, tuple) else value
        if value not in known:
            raise ConfigError(f"{key} in {source} must be {known[0]}, got {value}; pass another VAE")
    return {"batch_norm_eps": FLUX2_EPS, **{k: v for k, v in values.items() if k not in _FLUX2_FIXED}}


def latent_grid(config: Mapping[str, Any]) -> LatentGrid:
    """Return what a latent cell is in a network of whole settings."""
    patch = FLUX2_PATCH if "batch_norm_eps" in config else 1
    downscale = 2 ** (len(config["block_out_channels"]) - 1)
    return LatentGrid(int(config["latent_channels"]) * patch**2, int(downscale * patch), patch)


def infer_config(tensors: Mapping[str, Tensor], *, source: str) -> dict[str, Any]:
    """Return the settings that follow from the tensors (diffusers key names); group norms have 32 groups.

    Raises: CheckpointError if the tensors are not a KL autoencoder's, or leave its settings open.
    """
    first = tensors.get("encoder.conv_in.weight")
    if first is not None and first.ndim != 4:
        raise CheckpointError(
            f"{source} must hold a KL autoencoder of images, got one of videos; pass a VAE file"
        )
    try:
        levels = _count(tensors, r"encoder\.down_blocks\.(\d+)\.")
        channels = tuple(
            tensors[f"encoder.down_blocks.{level}.resnets.0.conv1.weight"].shape[0] for level in range(levels)
        )
        config = {
            "in_channels": tensors["encoder.conv_in.weight"].shape[1],
            "out_channels": tensors["decoder.conv_out.weight"].shape[0],
            "latent_channels": tensors["decoder.conv_in.weight"].shape[1],
            "block_out_channels": channels,
            "layers_per_block": _count(tensors, r"encoder\.down_blocks\.0\.resnets\.(\d+)\."),
            "down_block_types": ("DownEncoderBlock2D",) * levels,
            "up_block_types": ("UpDecoderBlock2D",) * levels,
            "norm_num_groups": 32,
            "use_quant_conv": "quant_conv.weight" in tensors,
            "use_post_quant_conv": "post_quant_conv.weight" in tensors,
            "mid_block_add_attention": "encoder.mid_block.attentions.0.to_q.weight" in tensors,
        }
        if "bn.running_mean" in tensors:
            config["batch_norm_eps"] = FLUX2_EPS
    except KeyError as err:
        raise CheckpointError(f"{source} must hold a whole KL autoencoder, got no {err.args[0]}") from err
    if any(width % 32 for width in channels):
        raise CheckpointError(
            f"widths of the VAE in {source} must be multiples of 32 when it has no config, got {channels}; "
            "write the config into the metadata `flowcore.config`"
        )
    return config


def _count(tensors: Mapping[str, Tensor], pattern: str) -> int:
    """Return one more than the largest number that the pattern finds in the names."""
    return 1 + max((int(m[1]) for m in map(re.compile(pattern).match, tensors) if m), default=-1)
