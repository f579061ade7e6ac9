"""What half precision costs: no more than the rounding of matrices and of what they are multiplied by."""

import importlib
import math
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from flowcore.ops import FloatConv2d, FloatLinear
from tests.golden.__main__ import OWN_FILES
from tests.golden.compare import Case, Options, judge
from tests.golden.rounding import rounding_ops
from tests.golden.test_golden import run

HALF = Options(dtype=torch.bfloat16)
BEYOND_THE_LIMIT = ("tinyflux/v42_predict", "xut/jax_xudit_concat_shared")
"""Small random models that exact arithmetic on rounded matrices and their inputs moves by over 0.03."""
MODELS = 20


def read(name: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(OWN_FILES / f"{name}.safetensors", framework="pt") as opened:
        return {key: opened.get_tensor(key) for key in opened.keys()}, opened.metadata()  # noqa: SIM118


def velocity(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], options: Options) -> Tensor:
    cases = importlib.import_module(f"tests.golden.{metadata['arch']}").cases(tensors, metadata, options)
    forwards = (case for case in cases if isinstance(case, Case) and case.output == "output.velocity")
    return next(forwards).actual.detach()


@pytest.mark.parametrize("name", BEYOND_THE_LIMIT)
def test_models_near_these_lose_no_more_than_the_rounding_costs(name: str) -> None:
    """One model's error is luck: of models whose weights differ in the eighth bit the mean is compared.

    The two are as large as each other, and which mean comes out above depends on the processor: so the
    difference of their logarithms may be above 0 by two of its standard errors.
    """
    tensors, metadata = read(name)
    generator = torch.Generator().manual_seed(0)
    logs = []
    for _ in range(MODELS):
        near = {
            key: tensor * (1 + (torch.rand(tensor.shape, generator=generator) - 0.5) / 128)
            if key.startswith("weight.")
            else tensor
            for key, tensor in tensors.items()
        }
        exact = velocity(near, metadata, Options())
        found = (velocity(near, metadata, options) for options in (HALF, HALF.floor()))
        logs.append([judge(Case("", result, exact)).relative for result in found])
    ours, floor = torch.tensor(logs).log().unbind(dim=1)
    assert float(floor.mean().exp()) > 0.03
    error = float((ours - floor).std()) / math.sqrt(MODELS)
    assert error < 0.05
    assert float((ours - floor).mean()) < 2 * error


def test_report_states_the_floor(tmp_path: Path) -> None:
    _, report = run(tmp_path, str(OWN_FILES / "tinyflux/v42_predict.safetensors"), "--dtype", "bfloat16")
    (failed,) = (case for case in report["cases"] if case["verdict"] == "failed")
    limit, floor, ours = (part.rsplit(" ", 1)[-1] for part in failed["reason"].split(", "))
    assert failed["reason"] == f"limit 0.03 not met, floor {floor}, ours {ours}"
    assert limit == "met"
    assert 0.03 < float(floor) < float(ours) == pytest.approx(failed["relative"], rel=1e-2)


def test_rounded_layers() -> None:
    ops = rounding_ops(torch.bfloat16)
    layer, plain = ops.linear(3, 2), torch.nn.Linear(3, 2)
    layer.load_state_dict(plain.state_dict())
    assert torch.equal(layer.weight, plain.weight.bfloat16().float())
    x = torch.tensor([[1.0, 2.0, 1 + 2**-10]])
    rounded = torch.tensor([[1.0, 2.0, 1.0]])
    expected = torch.nn.functional.linear(rounded, layer.weight, layer.bias)
    assert torch.equal(layer(x), expected)
    grid = ops.conv2d(1, 1, 1, bias=False)
    torch.nn.init.constant_(grid.weight, 1 + 2**-10)
    assert grid(torch.ones(1, 1, 1, 1)).item() == 1.0
    assert (ops.float_linear, ops.float_conv2d) == (FloatLinear, FloatConv2d)
