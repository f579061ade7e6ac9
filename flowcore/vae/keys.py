"""Key names of KL autoencoders: every published layout to the one of diffusers.

Source: black-forest-labs/flux `modules/autoencoder.py`, flux2 `autoencoder.py` and CompVis `ldm` share one
layout (called BFL here).
"""

import re
from collections.abc import Collection, Mapping
from functools import partial
from operator import itemgetter

from torch import Tensor

from ..errors import CheckpointError
from ..lazy import LazyTensors, Maker
from ..weights.kinds import describe_names

PREFIXES = ("", "vae.", "first_stage_model.", "model.")
_ANCHOR = "encoder.conv_in.weight"
_CODEBOOK = "quantize.embedding.weight"
_TRAINING = ("loss.", "model_ema.")
"""What the training of `ldm` leaves in a file beside the autoencoder."""
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_BFL_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}


def find_prefix(names: Collection[str], *, source: str) -> str:
    """Return what stands before the autoencoder's keys.

    Raises: CheckpointError if no autoencoder is among the names.
    """
    for prefix in PREFIXES:
        if prefix + _ANCHOR in names and prefix + _CODEBOOK not in names:
            return prefix
    raise CheckpointError(
        f"{source} must hold a KL autoencoder ({_ANCHOR}), got {describe_names(names)}; pass a VAE file"
    )


def to_diffusers(tensors: Mapping[str, Tensor]) -> LazyTensors:
    """Return the tensors under the key names of diffusers; 1x1 convolutions of attention become matrices."""
    is_bfl = any(name.startswith("encoder.down.") for name in tensors)
    levels = 1 + max(
        (int(m[1]) for m in map(re.compile(r"decoder\.up\.(\d+)\.").match, tensors) if m), default=-1
    )
    makers: dict[str, Maker] = {}
    for name in tensors:
        if name.startswith(_TRAINING):
            continue
        new = _from_bfl(name, levels) if is_bfl else _from_old_attention(name)
        is_matrix = re.search(r"\.attentions\.0\.to_\w+(\.0)?\.weight$", new) is not None
        makers[new] = partial(_matrix, name) if is_matrix else itemgetter(name)
    return LazyTensors(tensors, makers)


def _matrix(name: str, tensors: Mapping[str, Tensor]) -> Tensor:
    """Return a 1x1 convolution as a matrix."""
    tensor = tensors[name]
    return tensor.flatten(1) if tensor.ndim == 4 else tensor


def _from_old_attention(name: str) -> str:
    """Return the present name of a key from an old diffusers file."""
    return re.sub(
        r"(\.attentions\.0\.)(query|key|value|proj_attn)\.", lambda m: f"{m[1]}{_OLD_ATTENTION[m[2]]}.", name
    )


def _from_bfl(name: str, levels: int) -> str:
    """Return the diffusers name of a BFL key; the decoder's levels count the other way round there."""
    name = re.sub(r"^encoder\.down\.(\d+)\.block\.", r"encoder.down_blocks.\1.resnets.", name)
    name = re.sub(r"^encoder\.down\.(\d+)\.downsample\.", r"encoder.down_blocks.\1.downsamplers.0.", name)
    name = re.sub(
        r"^decoder\.up\.(\d+)\.block\.",
        lambda m: f"decoder.up_blocks.{levels - 1 - int(m[1])}.resnets.",
        name,
    )
    name = re.sub(
        r"^decoder\.up\.(\d+)\.upsample\.",
        lambda m: f"decoder.up_blocks.{levels - 1 - int(m[1])}.upsamplers.0.",
        name,
    )
    name = re.sub(r"\.mid\.block_([12])\.", lambda m: f".mid_block.resnets.{int(m[1]) - 1}.", name)
    name = re.sub(
        r"\.mid\.attn_1\.(norm|q|k|v|proj_out)\.",
        lambda m: f".mid_block.attentions.0.{_BFL_ATTENTION[m[1]]}.",
        name,
    )
    name = re.sub(r"^(?:encoder\.quant|decoder\.post_quant)_conv\.", lambda m: m[0].split(".", 1)[1], name)
    return name.replace(".nin_shortcut.", ".conv_shortcut.").replace(".norm_out.", ".conv_norm_out.")
