"""The tensors of TinyFlux files of every version, under today's names and back.

Source: AbstractEyes/tiny-flux, model files of versions 3, 4.1 and 4.2.
"""

from collections.abc import Collection, Container, Mapping
from functools import partial
from operator import itemgetter

import torch
from torch import Tensor

from ...errors import CheckpointError
from ...lazy import LazyTensors, renamed
from .config import TinyFluxConfig, is_match

_OLD_LUNE, _LUNE = "expert_predictor.", "lune_predictor."
_GATE = f"{_LUNE}expert_gate"
_QK_SCALE = "sol_prior.spatial_to_qk_scale."
_UPGRADED = ("lune_predictor.", "sol_prior.", "t5_pool.", "text_balance", "guidance_in.")


def version(keys: Collection[str]) -> str:
    """Return which version wrote a model with these bare names, as far as names tell."""
    if any(key.startswith(_OLD_LUNE) for key in keys):
        return "3"
    if any(key.startswith("sol_prior.") for key in keys):
        return "4.1 or 4.2" if f"{_QK_SCALE}weight" in keys else "4.2 (first)"
    if "text_balance" in keys or "rope.freqs_0" in keys:
        return "3 or later"
    return "2" if any(key.endswith(".sin_basis") for key in keys) else "1 or 2"


def is_version_3(keys: Collection[str]) -> bool:
    """Return whether bare names are those of version 3, which calls Lune an expert predictor."""
    return is_match(keys) and any(key.startswith(_OLD_LUNE) for key in keys)


def has_idle(keys: Collection[str]) -> bool:
    """Return whether a file of another version than 3 holds tensors that its model never reads."""
    return is_match(keys) and any(_is_idle(key, keys) for key in keys)


def version_3_to_current(tensors: Mapping[str, Tensor]) -> LazyTensors:
    """Return the tensors under today's names, the gate as a number, without what version 3 never reads.

    Version 3 adds embedded guidance only where it has no expert predictor.
    """
    current = {key: key.replace(_OLD_LUNE, _LUNE, 1) for key in tensors if not key.startswith("guidance_in.")}
    return LazyTensors(
        tensors,
        {
            new: partial(_number, key) if new == _GATE else itemgetter(key)
            for key, new in current.items()
            if not _is_idle(new, current.values())
        },
    )


def _number(key: str, tensors: Mapping[str, Tensor]) -> Tensor:
    return tensors[key].reshape(())


def current_to_version_3(tensors: Mapping[str, Tensor], config: TinyFluxConfig) -> dict[str, Tensor]:
    """Return the tensors as version 3 names and shapes them: the inverse of `version_3_to_current`.

    Raises: CheckpointError if the model has parts that version 3 does not know.
    """
    if config.use_sol_prior or config.use_t5_vec:
        raise CheckpointError("a TinyFlux 3 model must be without Sol and T5 vector, got a later model")
    old = {key.replace(_LUNE, _OLD_LUNE, 1): tensor for key, tensor in tensors.items()}
    gate = f"{_OLD_LUNE}expert_gate"
    if gate in old:
        old[gate] = old[gate].reshape(1)
    return old


def without_idle(tensors: Mapping[str, Tensor]) -> LazyTensors:
    """Return the tensors but for those that no model reads: tables, and attention parts of an absent Sol."""
    return renamed(tensors, {key: key for key in tensors if not _is_idle(key, tensors)})


def _is_idle(key: str, keys: Container[str]) -> bool:
    if key.endswith(".sin_basis"):
        return True
    is_modulation = ".attn.spatial_to_mod." in key
    return is_modulation and "sol_prior.blend_gate" not in keys


def with_qk_scale(tensors: Mapping[str, Tensor], config: TinyFluxConfig) -> dict[str, Tensor]:
    """Return the tensors with the unused layer that strict readers of 4.1 and 4.2 files expect."""
    heads = config.num_attention_heads
    like = next(iter(tensors.values()))
    added = {
        f"{_QK_SCALE}weight": torch.zeros(heads, 1, dtype=like.dtype),
        f"{_QK_SCALE}bias": torch.ones(heads, dtype=like.dtype),
    }
    return {**added, **tensors} if config.use_sol_prior else dict(tensors)


def upgrade(old: Mapping[str, Tensor], fresh: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Return a newer model's tensors with an older one's in their place, and the names that stayed fresh.

    Args:
        old: tensors under today's names.
        fresh: the initial tensors of the model to train.

    Raises: CheckpointError if a tensor is missing that every version has, or has another shape.
    """
    missing = [key for key in fresh if key not in old]
    lost = [key for key in missing if not (key.startswith(_UPGRADED) or ".spatial_to_mod." in key)]
    lost += [key for key in old if key in fresh and old[key].shape != fresh[key].shape]
    lost += [key for key in old if key not in fresh]
    if lost:
        raise CheckpointError(
            f"an older TinyFlux model must fit the new one but for its experts, got {len(lost)} tensors that "
            f"do not: {', '.join(lost[:5])}"
        )
    return {key: old.get(key, tensor) for key, tensor in fresh.items()}, missing
