"""What a file's tensor names look like, in the words of a message."""

import re
from collections.abc import Collection

from ..errors import CheckpointError
from ..models import detect

# The first pattern that any name matches decides.
_KINDS = (
    (r"\.(lora|lokr|hada)_", "a LoRA"),
    (r"^(taesd_)?(encoder|decoder)\.(layers\.)?\d+\.", "a preview autoencoder (TAESD)"),
    (r"(^|\.)v?quantizer?\.", "a VQ autoencoder"),
    (r"(^|\.)(en|de)coder\.(conv_in\.conv|conv1|middle\.\d+)\.", "a video autoencoder"),
    (r"(^|\.)(en|de)coder\.(stages|project_in)\.", "a DC autoencoder"),
    (r"(^|\.)encoder\.conv_in\.weight$", "a VAE"),
    (r"(^|\.)(embed_tokens|shared|token_embedding|wte)\.weight$", "a text encoder"),
    (r"(^|\.)(input_blocks|down_blocks)\.\d+\.", "a UNet"),
    (r"(^|\.)\w*blocks\.\d+\.", "another diffusion transformer"),
)


def describe_names(names: Collection[str]) -> str:
    """Return what a file of these tensor names is, as "a flux model (780 tensors)"."""
    return f"{_kind(names)} ({len(names)} tensors such as {min(names, default='none')})"


def model_name(names: Collection[str]) -> str | None:
    """Return the architecture of the model that is among the names, or None."""
    try:
        return detect(names)[0].name
    except CheckpointError:
        return None


def _kind(names: Collection[str]) -> str:
    name = model_name(names)
    if name is not None:
        return f"a {name} model"
    for pattern, kind in _KINDS:
        if any(re.search(pattern, name) for name in names):
            return kind
    return "no known kind"
