"""Which text networks a file holds, told by its tensor names alone."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..lazy import LazyTensors, renamed
from ..weights.kinds import model_name


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """A sort of text network.

    name: also that of the module which builds it. title: for messages. markers: bare tensor names by which it
    is known. unused: how bare names begin that encoding does not use. family: of its tokenizers.
    model_types: what a config.json calls it, or the model of which it is a part.
    dtype: what it computes in unless told otherwise; None = as its file is stored.
    """

    name: str
    title: str
    markers: tuple[str, ...]
    unused: tuple[str, ...]
    family: str
    model_types: tuple[str, ...]
    dtype: torch.dtype | None = None


_IMAGE_HALF = ("vision_tower.", "multi_modal_projector.")
KINDS: tuple[Kind, ...] = (
    Kind(
        name="t5gemma2",
        title="T5Gemma2 encoder",
        markers=("embed_tokens.eoi_embedding",),
        unused=_IMAGE_HALF,
        family="Gemma",
        model_types=("t5gemma2", "t5gemma2_encoder", "t5gemma2_text"),
    ),
    Kind(
        name="gemma3",
        title="Gemma-3 text model",
        markers=("embed_tokens.weight", "layers.0.pre_feedforward_layernorm.weight"),
        unused=(*_IMAGE_HALF, "lm_head."),
        family="Gemma",
        model_types=("gemma3_text", "gemma3"),
        dtype=torch.float32,
    ),
    Kind(
        name="t5",
        title="T5 encoder",
        markers=("encoder.block.0.layer.0.SelfAttention.q.weight",),
        unused=("decoder.", "lm_head.", "logit_scale", "text_projection"),
        family="T5",
        model_types=("t5",),
    ),
    Kind(
        name="clip",
        title="CLIP text model",
        markers=("embeddings.token_embedding.weight", "encoder.layers.0.self_attn.q_proj.weight"),
        unused=("embeddings.position_ids", "logit_scale", "text_projection"),
        family="CLIP",
        model_types=("clip_text_model", "clip"),
    ),
)
TITLES = ", ".join(kind.title for kind in KINDS[:-1]) + f" or {KINDS[-1].title}"

# What other files hold: a part of their tensor names, and what to call them.
_OTHERS = (
    (".relative_attention_bias.", "a UMT5 or other T5-like encoder; use T5 v1.1 or Flan-T5"),
    ("lora_", "an adapter; load it as a LoRA on top of a text encoder"),
    (".resblocks.", "an OpenCLIP model; use the file in the names of transformers"),
    ("patch_embedding", "an image encoder such as CLIP vision; use the file of the text model"),
    ("self_attn.q_proj", "a language model of another kind"),
    ("encoder.conv_in", "a VAE; pass a text encoder"),
    ("decoder.conv_in", "a VAE; pass a text encoder"),
    ("blocks.", "a diffusion model; pass a text encoder"),
)


class Part(NamedTuple):
    """A text network in a file: its kind, and the tensors under their bare names."""

    kind: Kind
    state: Mapping[str, Tensor]


def find_parts(tensors: Mapping[str, Tensor], source: str) -> list[Part]:
    """Return the text networks among a file's tensors, whatever stands before their names.

    An all-in-one checkpoint may hold several; a decoder is none.
    Raises: CheckpointError that says what the file holds instead.
    """
    found = [
        (kind, prefix)
        for kind in KINDS
        for prefix in sorted(_prefixes(tensors, kind.markers))
        if "decoder." not in prefix
    ]
    seen: set[str] = set()
    parts = []
    for kind, prefix in found:
        if prefix in seen:  # a T5Gemma2 has the markers of a Gemma-3, too
            continue
        seen.add(prefix)
        parts.append(Part(kind, _bare(tensors, prefix, kind.unused)))
    if not parts or any(_is_umt5(part) for part in parts):
        raise CheckpointError(
            f"{source} must hold a {TITLES}, got {len(tensors)} tensors of {_describe(tensors)}"
        )
    return parts


def _prefixes(names: Collection[str], markers: tuple[str, ...]) -> set[str]:
    """Return what stands before the markers, where all of them stand."""
    first, *others = markers
    starts = {name[: -len(first)] for name in names if f".{name}".endswith(f".{first}")}
    return {start for start in starts if all(start + other in names for other in others)}


def _bare(tensors: Mapping[str, Tensor], prefix: str, unused: tuple[str, ...]) -> LazyTensors:
    bare = {name.removeprefix(prefix): name for name in tensors if name.startswith(prefix)}
    return renamed(tensors, {new: name for new, name in bare.items() if not new.startswith(unused)})


def _is_umt5(part: Part) -> bool:
    return "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight" in part.state


def _describe(names: Collection[str]) -> str:
    """Return what the names look like, for a message."""
    architecture = model_name(names)
    if architecture is not None:
        return f"a {architecture} model"
    for mark, what in _OTHERS:
        if any(mark in name for name in names):
            return what
    return f"something else ({', '.join(sorted(names)[:5])})"
