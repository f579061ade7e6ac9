"""TinyFlux in half precision, without and with autocast."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from flowcore.models.tinyflux import TinyFlux
from tests.golden.tinyflux import Options, load, model_inputs
from tests.support import BFLOAT16_LIMIT, FLOAT16_LIMIT, ROOT, assert_close, spread_of
from tests.unit.models.tinyflux.small import CONFIG, inputs, random_model, teachers

GOLDEN = ROOT / "tests/golden/tinyflux"


@torch.no_grad()
@pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.bfloat16, BFLOAT16_LIMIT), (torch.float16, FLOAT16_LIMIT)]
)
@pytest.mark.parametrize("taught", [False, True])
def test_half_precision_without_autocast(dtype: torch.dtype, limit: float, taught: bool) -> None:
    model, given = random_model(), {**inputs(), **(teachers() if taught else {})}
    expected = model(**given)
    half = TinyFlux(CONFIG, dtype=dtype).eval()
    half.load_state_dict(model.state_dict())
    halved = {
        name: value.to(dtype) if isinstance(value, Tensor) and name != "timestep" else value
        for name, value in given.items()
    }
    result = half(**halved)
    assert result.dtype == dtype
    assert_close(result.float(), expected, limit=3 * limit)  # random weights, larger than trained ones
    assert half.rope.freqs_1.dtype == torch.float32
    assert half.single_blocks[0].norm2.weight.dtype == torch.float32


def test_training_under_autocast_keeps_what_steers_the_blocks_in_float32() -> None:
    model, given = random_model(), inputs()
    expected, info = model(**given, return_expert_pred=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result, under = model(**given, **teachers(), return_expert_pred=True)
        plain = model(**given)
    assert torch.equal(under["lune"]["expert_pred"], info["lune"]["expert_pred"])
    assert_close(plain, expected, limit=3 * BFLOAT16_LIMIT)
    result.float().square().sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_converted_model_runs(dtype: torch.dtype) -> None:
    model, given = random_model().to(dtype), inputs()
    halved = {
        name: value.to(dtype) if isinstance(value, Tensor) and name != "timestep" else value
        for name, value in given.items()
    }
    result = model(**halved)
    assert result.dtype == dtype
    assert_close(result.float(), random_model()(**given), limit=5 * BFLOAT16_LIMIT)


@torch.no_grad()
@pytest.mark.parametrize("name", ["v42_predict", "v42_teacher"])
def test_bfloat16_costs_what_the_rounding_of_the_weights_does(name: str) -> None:
    """These small models of large weights move by more than the limit when the weights alone are rounded."""
    file = GOLDEN / f"{name}.safetensors"
    tensors = load_file(file)
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    single, half = (Options(dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    stored = {
        name: tensor.bfloat16().float() if name.startswith("weight.") and tensor.ndim > 1 else tensor
        for name, tensor in tensors.items()
    }
    errors = []
    for weights, options in ((stored, single), (tensors, half)):
        model = load(weights, metadata, options).model
        result = model(**model_inputs(model, tensors, metadata, options)).float()
        expected = tensors["output.velocity"]
        errors.append((result - expected).abs().max().item() / spread_of(expected))
    rounding, computed = errors
    assert rounding > BFLOAT16_LIMIT
    assert computed < 1.25 * rounding
