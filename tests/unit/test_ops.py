"""Layers whose arithmetic is float32 whatever holds their weights."""

import pytest
import torch

from flowcore.ops import TORCH_OPS

HALVES = (torch.bfloat16, torch.float16)


@torch.no_grad()
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("bias", [True, False])
def test_float_layers_take_any_dtype(dtype: torch.dtype, bias: bool) -> None:
    x = torch.randn(2, 4, 3, 5).to(dtype)
    linear = TORCH_OPS.float_linear(5, 6, bias=bias).to(dtype)
    convolution = TORCH_OPS.float_conv2d(4, 6, 2, stride=2, bias=bias).to(dtype)
    for layer in (linear, convolution):
        result = layer(x)
        assert result.dtype == torch.float32
        assert torch.equal(result, layer.float()(x.float()))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_wide_layers_compute_half_precision_in_float32_on_a_cpu(dtype: torch.dtype) -> None:
    layer, x = TORCH_OPS.wide_linear(64, 8), torch.randn(3, 64)
    half = TORCH_OPS.wide_linear(64, 8, dtype=dtype)
    half.load_state_dict(layer.state_dict())
    expected = torch.nn.functional.linear(x.to(dtype).float(), half.weight.float(), half.bias.float())
    assert torch.equal(half(x.to(dtype)), expected)
    assert torch.equal(layer(x), torch.nn.functional.linear(x, layer.weight, layer.bias))
