"""Both filters against their formulas, on every kind of grid, in every dtype."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from flowcore.models.single_stream import PRESETS
from flowcore.models.single_stream.fourier import ChannelMixer, FilteredResidual, SpectralGain
from flowcore.ops import TORCH_OPS
from tests.support import FORWARD_LIMIT, assert_close

CONFIG = replace(PRESETS["tiny"], hidden_size=8, num_heads=1, fourier_gate=0.3)
FILTERS = {"v3": ChannelMixer, "head": SpectralGain}
GRIDS = [(4, 4), (5, 7), (8, 3), (3, 6)]


def random_filter(variant: str) -> nn.Module:
    """A filter in which every parameter has an effect."""
    module = FILTERS[variant](CONFIG, ops=TORCH_OPS, device=None)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            nn.init.normal_(parameter, 0.3, 0.5, generator=generator)
    return module


def tokens(rows: int, columns: int, batch: int = 2) -> Tensor:
    return torch.randn(batch, rows * columns, 8, generator=torch.Generator().manual_seed(1))


def real_part_of_the_inverse(spectrum: Tensor, columns: int) -> Tensor:
    """The grid of a half spectrum by the definition, float64: every frequency's wave, its real part alone."""
    rows, half = spectrum.shape[1:3]
    grid = torch.zeros(spectrum.shape[0], rows, columns, spectrum.shape[-1], dtype=torch.float64)
    y, x = torch.arange(rows)[:, None], torch.arange(columns)[None]
    for ky in range(rows):
        for kx in range(half):
            twice = 1 if 2 * kx % columns == 0 else 2  # the missing half mirrors all but its own columns
            angle = 2 * torch.pi * (ky * y / rows + kx * x / columns)
            wave = torch.polar(torch.ones_like(angle, dtype=torch.float64), angle.double())
            grid += twice * (wave[None, ..., None] * spectrum[:, ky, kx][:, None, None]).real
    return grid / (rows * columns) ** 0.5


@torch.no_grad()
@pytest.mark.parametrize(("rows", "columns"), [*GRIDS, (1, 1), (2, 1), (1, 4)])
def test_mixer_is_its_formula(rows: int, columns: int) -> None:
    module, x = random_filter("v3"), tokens(rows, columns)
    spectrum = torch.fft.fft2(x.double().view(2, rows, columns, 8), dim=(1, 2), norm="ortho")
    spectrum = spectrum[:, :, : columns // 2 + 1]
    interleaved = torch.stack((spectrum.real, spectrum.imag), dim=-1).flatten(-2)
    out = module.double().freq_mlp[2].weight.new_zeros(0)  # parameters in float64 from here
    first, last = module.freq_mlp[0], module.freq_mlp[2]
    hidden = nn.functional.silu(interleaved @ first.weight.T + first.bias)
    out = (hidden @ last.weight.T + last.bias).unflatten(-1, (8, 2))
    grid = real_part_of_the_inverse(torch.complex(out[..., 0], out[..., 1]), columns)
    expected = module.gate.tanh() * grid.flatten(1, 2)
    assert_close(random_filter("v3")(x, rows, columns), expected.float(), limit=FORWARD_LIMIT)


@torch.no_grad()
@pytest.mark.parametrize(("rows", "columns"), GRIDS)
def test_gain_is_its_formula(rows: int, columns: int) -> None:
    module, x = random_filter("head"), tokens(rows, columns)
    grid = x.view(2, rows, columns, 8).permute(0, 3, 1, 2)
    padded = nn.functional.pad(grid, (2, 2, 2, 2), mode="reflect").permute(0, 2, 3, 1).double()
    height, width = rows + 4, columns + 4
    spectrum = torch.fft.fft2(padded, dim=(1, 2), norm="ortho")[:, :, : width // 2 + 1]
    gain = torch.empty(height, width // 2 + 1, 8, dtype=torch.complex128)
    for ky in range(height):
        for kx in range(width // 2 + 1):
            place = torch.tensor([(ky if ky <= (height - 1) // 2 else ky - height) / height, kx / width])
            radius = place.norm() / 0.70710678
            low = torch.sigmoid(
                (module.raw_cutoff.sigmoid() - radius) * nn.functional.softplus(module.raw_scale)
            )
            blend = low * module.low_mlp(place) + (1 - low) * module.high_mlp(place)
            gain[ky, kx] = torch.polar(blend[:8].tanh().exp(), torch.pi * blend[8:])
    result = real_part_of_the_inverse(spectrum * gain, width)[:, 2:-2, 2:-2]
    expected = module.gate.tanh() * result.flatten(1, 2)
    assert_close(module(x, rows, columns), expected.float(), limit=FORWARD_LIMIT)


@torch.no_grad()
@pytest.mark.parametrize("variant", FILTERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_whatever_the_dtype(variant: str, dtype: torch.dtype) -> None:
    module, x = random_filter(variant), tokens(5, 7).to(dtype)
    expected = module(x.float(), 5, 7)
    assert torch.equal(module(x, 5, 7), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(module(x, 5, 7), expected)
    rounded = module.to(dtype)(x, 5, 7)  # a host may round the weights; the arithmetic stays
    widened = random_filter(variant)
    widened.load_state_dict(module.state_dict())
    assert torch.equal(rounded, widened(x.float(), 5, 7))


@torch.no_grad()
@pytest.mark.parametrize("variant", FILTERS)
def test_batch_of_two_equals_two_of_one(variant: str) -> None:
    module, x = random_filter(variant), tokens(4, 6)
    single = torch.cat([module(one[None], 4, 6) for one in x])
    assert_close(module(x, 4, 6), single, limit=FORWARD_LIMIT)


@torch.no_grad()
def test_gain_is_linear_and_the_mixer_is_not() -> None:
    x = tokens(4, 6)
    gain, mixer = random_filter("head"), random_filter("v3")
    assert_close(gain(3 * x, 4, 6), 3 * gain(x, 4, 6), limit=FORWARD_LIMIT)
    assert not torch.allclose(mixer(3 * x, 4, 6), 3 * mixer(x, 4, 6), atol=1e-2)


@pytest.mark.parametrize("variant", FILTERS)
def test_zero_gate_is_silent_but_learns(variant: str) -> None:
    module = random_filter(variant)
    with torch.no_grad():
        module.gate.zero_()
    result = module(tokens(4, 4), 4, 4)
    assert not result.any()
    result.sum().backward()
    assert module.gate.grad is not None
    assert module.gate.grad.any()


@pytest.mark.parametrize("variant", FILTERS)
def test_gradients_are_those_of_the_values(variant: str) -> None:
    """Numeric differences along a random direction, of a sum with random weights."""
    module, x = random_filter(variant), tokens(4, 5, batch=1)
    weights, direction = torch.randn_like(x), torch.randn_like(x)
    given = x.clone().requires_grad_()
    (weights * module(given, 4, 5)).sum().backward()
    assert given.grad is not None
    with torch.no_grad():
        step = 1e-2
        ahead, behind = (module(x + sign * step * direction, 4, 5) for sign in (1, -1))
        numeric = (weights * (ahead - behind)).sum() / (2 * step)
    assert (given.grad * direction).sum().item() == pytest.approx(numeric.item(), rel=1e-2)


@torch.no_grad()
def test_the_stack_adds_to_the_stream() -> None:
    module = FilteredResidual(CONFIG, ops=TORCH_OPS, device=None)
    x = tokens(4, 5)
    expected = x + module.filter(module.norm(x), 4, 5)
    assert torch.equal(module(x, 4, 5), expected)
