"""What a handler yields, what the command may ask of it, and the verdict on two tensors.

A handler is a function `cases(tensors, metadata, options) -> Iterator[Outcome]`, one for each architecture
that the metadata of a file may name. It yields every `output.*` tensor of the file once, under its full name,
with what the project computes; the command makes a failure of each tensor that it leaves out. Plain tuples
(output, actual, expected) serve as well. `document_cases(document, options)` does the same for JSON files,
and `timed_forward(tensors, metadata, options)` gives a call to time, or None.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flowcore.ops import TORCH_OPS, Ops
from flowcore.weights.checkpoint import LoadedModel, build_model
from tests.golden.rounding import rounding_ops

Tensors = Mapping[str, Tensor]
Metadata = Mapping[str, str]

FORWARD_LIMIT = 5e-5  # one forward or one module in float32: the sum of roundings of a few dozen layers
CHAIN_LIMIT = 1e-4  # sampler chains, gradients and losses add up several forwards
FLOAT64_LIMIT = 1e-9
CONSTANT_LIMIT = 1e-6  # absolute: a constant has no spread to measure by
WHOLE_MODEL_LIMITS = {torch.float32: FORWARD_LIMIT, torch.bfloat16: 3e-2, torch.float16: 1e-2}


class Case(NamedTuple):
    """One comparison. limit: of the relative error; None = by the dtype of what is expected."""

    output: str
    actual: Tensor
    expected: Tensor
    limit: float | None = None


class Checked(NamedTuple):
    """One comparison of things that are no tensors; an empty reason means that it holds."""

    compared: str
    reason: str


class Skipped(NamedTuple):
    """An output that the options rule out, and why."""

    output: str
    reason: str


Outcome = Case | Checked | Skipped


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What the command line asks of a handler. compile, dtype and device concern whole models.

    rounded: instead of the forward in this dtype, what no forward in it can do better: float32 arithmetic
    with the model's inputs, the matrices of its blocks and what they are multiplied by rounded to the dtype.
    """

    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    compile: bool = False
    rounded: torch.dtype | None = None

    @property
    def ops(self) -> Ops:
        """The layers that models are built of."""
        return TORCH_OPS if self.rounded is None else rounding_ops(self.rounded)

    def cast(self, x: Tensor) -> Tensor:
        """An input of a model as its forward is given it."""
        return (x if self.rounded is None else x.to(self.rounded)).to(self.dtype)

    def floor(self) -> "Options":
        """The options of the forward that these in half precision are measured by."""
        return Options(device=self.device, rounded=self.dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """The verdict on one case."""

    file: str
    arch: str
    kind: str
    compared: str
    verdict: str
    max_abs: float | None = None
    relative: float | None = None
    tolerance: float | None = None
    reason: str = ""
    seconds: float | None = None
    backward_seconds: float | None = None
    peak_mib: float | None = None


class Verdict(NamedTuple):
    """How far two tensors are apart, how far they may be, and what is wrong if anything."""

    max_abs: float | None
    relative: float | None
    tolerance: float | None
    reason: str


def part(tensors: Tensors, prefix: str) -> dict[str, Tensor]:
    """The tensors under a prefix, by the rest of their names."""
    return {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def stored_config(metadata: Metadata) -> dict[str, Any]:
    """The configuration of a file, without the name of the object that it belongs to."""
    config: dict[str, Any] = json.loads(metadata["config"])
    config.pop("class", None)
    return config


def load(tensors: Tensors, metadata: Metadata, options: Options) -> LoadedModel:
    """The model of a file's weights and configuration, through the path that users' files take."""
    return load_weights(part(tensors, "weight."), stored_config(metadata), options)


def load_weights(weights: Tensors, settings: Mapping[str, Any], options: Options) -> LoadedModel:
    """The model of weights by their own names, whose file states `settings`."""
    return build_model(
        weights,
        {"flowcore.config": json.dumps(settings)},
        source="weights",
        device=options.device,
        dtype=options.dtype,
        ops=options.ops,
    )


def judge(case: Case) -> Verdict:
    """The verdict on a case; its reason is empty when it holds."""
    actual, expected = case.actual.detach().cpu(), case.expected.detach().cpu()
    if actual.shape != expected.shape:
        return Verdict(None, None, None, f"shape {tuple(actual.shape)} instead of {tuple(expected.shape)}")
    if not expected.is_floating_point():
        different = int((actual != expected).sum()) if actual.dtype == expected.dtype else expected.numel()
        reason = f"{different} of {expected.numel()} elements differ" if different else ""
        return Verdict(float(bool(different)), float(bool(different)), 0.0, reason)
    if expected.dtype == torch.float16:
        return _judge_half(actual, expected)
    if not torch.equal(actual.isfinite(), expected.isfinite()):
        return Verdict(None, None, None, "not finite where the other is")
    return _judge_float(actual.double(), expected.double(), case.limit or _default_limit(expected.dtype))


def _default_limit(dtype: torch.dtype) -> float:
    return FLOAT64_LIMIT if dtype == torch.float64 else FORWARD_LIMIT


def _judge_float(actual: Tensor, expected: Tensor, limit: float) -> Verdict:
    """Largest error over the standard deviation of the reference; absolute where that is 0."""
    same = actual == expected  # also where both are the same infinity
    error = torch.where(same, 0.0, (actual - expected).abs()).nan_to_num(nan=torch.inf)
    max_abs = error.max().item() if error.numel() else 0.0
    finite = expected[expected.isfinite()]
    scale = (finite.std() if finite.numel() >= 2 else finite.abs().sum()).item()
    if not scale:
        scale, limit = 1.0, CONSTANT_LIMIT
    relative = max_abs / scale
    reason = "" if relative <= limit else f"relative error {relative:.2g} above {limit:.2g}"
    return Verdict(max_abs, relative, limit, reason)


def _judge_half(actual: Tensor, expected: Tensor) -> Verdict:
    """Stored in float16: at most one unit in the last place."""
    steps = (_ordinal(actual.half()) - _ordinal(expected)).abs()
    largest = float(steps.max()) if steps.numel() else 0.0
    max_abs = (actual.double() - expected.double()).abs().max().item() if steps.numel() else 0.0
    return Verdict(max_abs, largest, 1.0, "" if largest <= 1 else f"{largest:g} units in the last place")


def _ordinal(values: Tensor) -> Tensor:
    """Integers in the order of float16 values, neighbours being one apart."""
    bits = values.contiguous().view(torch.int16).int()
    return torch.where(bits < 0, -(bits & 0x7FFF), bits)
