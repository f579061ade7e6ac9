"""Comparison of tensors with stated limits, and the paths that tests use."""

import os
import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent

# Largest absolute error divided by the standard deviation of the reference.
FORWARD_LIMIT = 5e-5  # one float32 forward: sums come out in another order
CHAIN_LIMIT = 1e-4  # float32 sampler chains, gradients and losses: such errors add up
EXACT_LIMIT = 1e-9  # float64 formulas
BFLOAT16_LIMIT = 3e-2  # 8 bits of mantissa through a whole model
FLOAT16_LIMIT = 1e-2  # 11 bits of mantissa through a whole model
CONSTANT_LIMIT = 1e-6  # absolute, where the reference does not vary


def spread_of(expected: Tensor) -> float:
    """What errors are measured by: the standard deviation; the size of a single value; 0 for a constant."""
    values = expected.double()
    return values.std().item() if values.numel() > 1 else values.abs().max().item()


def assert_close(actual: Tensor, expected: Tensor, *, limit: float, what: str = "tensor") -> None:
    """Fail with figures unless actual has expected's shape and its largest error is within limit x spread.

    Integer and boolean tensors must be equal. A tensor that is not finite is close to nothing. Where expected
    does not vary, the error must be within CONSTANT_LIMIT.
    """
    assert actual.shape == expected.shape, f"{what}: shape {actual.shape}, expected {expected.shape}"
    if not expected.is_floating_point():
        assert torch.equal(actual, expected), f"{what}: {int((actual != expected).sum())} values differ"
        return
    if expected.numel() == 0:
        return
    assert torch.isfinite(actual).all(), f"{what}: has values that are not finite"
    error = (actual.double() - expected.double()).abs().max().item()
    spread = spread_of(expected)
    allowed = limit * spread if spread > 0 else CONSTANT_LIMIT
    assert error <= allowed, f"{what}: error {error:.3g} above {allowed:.3g} (spread {spread:.3g})"


def run_python(
    *arguments: str, cwd: Path = ROOT, timeout: float = 300, **environment: str
) -> "subprocess.CompletedProcess[str]":
    """Outcome, with captured output, of this interpreter run with arguments such as "-m", "flowcore"."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout,
    )
