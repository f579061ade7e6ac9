"""TinyFlux in half precision, without and with autocast."""

import re

import pytest
import torch
from torch import Tensor

from flowcore.models.tinyflux import TinyFlux
from tests.support import BFLOAT16_LIMIT, FLOAT16_LIMIT, assert_close
from tests.unit.models.tinyflux.small import CONFIG, inputs, random_model, teachers


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
    matrices = re.compile(r"\w+_blocks\.\d+\.(attn|mlp|img_mlp|txt_mlp)\.(\w*qkv|\w+_out|out_proj|fc\d)\..*")
    for name, parameter in half.named_parameters():
        assert parameter.dtype == (dtype if matrices.fullmatch(name) else torch.float32), name


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
