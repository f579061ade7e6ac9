"""The arithmetic of adapters: what their tensors add to a weight."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from ..errors import CheckpointError


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """What one adapter does to one parameter.

    parts: its tensors by role. rows: which rows of the parameter, in the adapter's order; none = all of them.
    alpha: None = the rank. key: the adapter's name in its file, for messages.
    """

    parameter: str
    rows: tuple[slice, ...] = ()
    parts: Mapping[str, Tensor]
    alpha: float | None = None
    key: str

    def height(self, whole: int) -> int:
        """Return how many rows change of a parameter with so many."""
        return sum(len(range(*rows.indices(whole))) for rows in self.rows) or whole

    @property
    def replaces(self) -> bool:
        """Whether the parameter is set, and not added to."""
        return "set" in self.parts


def changed(weight: Tensor, change: Change, strength: float, *, may_widen: bool = False) -> Tensor:
    """Return weight, float32, as the change makes it; a new tensor.

    W + strength * alpha / rank * up @ down and its kin; with a magnitude, the part of the way to
    magnitude * V / |V|, V = W + alpha / rank * up @ down (Liu et al. 2024, arXiv:2402.09353, eq. 5). A
    replacement does not depend on the strength.
    may_widen: whether a matrix may get further columns, which start at zero.
    Raises: CheckpointError if the adapter lacks a tensor or does not have the weight's shape.
    """
    if change.replaces:
        return _fitting(change.parts["set"].to(weight), weight.shape, change)
    delta = _delta(change).to(weight.device)
    if may_widen and weight.ndim == 2 and delta.ndim == 2 and delta.shape[1] > weight.shape[1]:
        weight = functional.pad(weight, (0, delta.shape[1] - weight.shape[1]))
    delta = _fitting(delta, torch.Size((change.height(weight.shape[0]), *weight.shape[1:])), change)
    magnitude = change.parts.get("magnitude")
    result, start = weight.clone(), 0
    for rows in change.rows or (slice(None),):
        part = weight[rows]
        own = slice(start, start + part.shape[0])
        if magnitude is None:
            result[rows] = part + strength * delta[own]
        else:
            target = _with_magnitude(part + delta[own], magnitude.to(part), own, change)
            result[rows] = part + strength * (target - part)
        start = own.stop
    return result


def _fitting(tensor: Tensor, shape: torch.Size, change: Change) -> Tensor:
    """Return the tensor in the shape, which may have more axes (kernels) or none (scalars)."""
    if tensor.numel() != shape.numel() or tensor.shape[:1] != shape[:1]:
        raise CheckpointError(
            f"{change.key} must change {change.parameter} in the shape {tuple(shape)}, got "
            f"{tuple(tensor.shape)}; the LoRA is for another model"
        )
    return tensor.reshape(shape)


def _with_magnitude(total: Tensor, magnitude: Tensor, own: slice, change: Change) -> Tensor:
    """Return the matrix with columns (magnitude `1 in`) or rows (`out` or `out 1`) of the given lengths."""
    is_of_columns = magnitude.ndim == 2 and magnitude.shape[0] == 1 and total.shape[0] != 1
    lengths = magnitude if is_of_columns else magnitude.reshape(-1, 1)[own]
    norms: Tensor = torch.linalg.vector_norm(total, dim=0 if is_of_columns else 1, keepdim=True)
    if lengths.shape != norms.shape:
        raise CheckpointError(
            f"magnitudes of {change.key} must have shape {tuple(norms.shape)}, got {tuple(magnitude.shape)}"
        )
    return total * (lengths / norms)


def _delta(change: Change) -> Tensor:
    """Return what the adapter adds at strength 1, float32."""
    parts = {role: tensor.float() for role, tensor in change.parts.items()}
    if "diff" in parts:
        return parts["diff"]
    if "down" in parts and "up" in parts:
        return _scaled(change, _product(change, parts["up"], parts["down"]), parts["down"].shape[0])
    if all(f"hada_w{i}_{side}" in parts for i in (1, 2) for side in "ab"):
        first, second = (_product(change, parts[f"hada_w{i}_a"], parts[f"hada_w{i}_b"]) for i in (1, 2))
        return _scaled(change, first * second, parts["hada_w1_b"].shape[0])
    factors = [_kronecker_factor(change, parts, f"lokr_w{i}") for i in (1, 2)]
    ranks = [parts[name].shape[0] for name in ("lokr_w1_b", "lokr_w2_b") if name in parts]
    product = torch.kron(factors[0], factors[1])
    # Two full factors carry their scale themselves.
    return _scaled(change, product, ranks[0]) if ranks else product


def _kronecker_factor(change: Change, parts: Mapping[str, Tensor], name: str) -> Tensor:
    if name in parts:
        return parts[name].flatten(1)
    if f"{name}_a" in parts and f"{name}_b" in parts:
        return _product(change, parts[f"{name}_a"], parts[f"{name}_b"])
    raise CheckpointError(
        f"{change.key} must have all tensors of its adapter, got {', '.join(change.parts)} alone; "
        "the file is incomplete"
    )


def _product(change: Change, left: Tensor, right: Tensor) -> Tensor:
    """Return the matrix product; kernels are matrices with flattened inputs."""
    left, right = left.flatten(1), right.flatten(1)
    if left.shape[1] != right.shape[0]:
        raise CheckpointError(
            f"the factors of {change.key} must share their rank, got {tuple(left.shape)} and "
            f"{tuple(right.shape)}"
        )
    return left @ right


def _scaled(change: Change, delta: Tensor, rank: int) -> Tensor:
    return delta if change.alpha is None else delta * (change.alpha / rank)
