"""The average of weights: its formula, that it moves, that sampling with it leaves both as they were."""

import pytest
import torch
from torch import nn

from training.ema import Ema


def linear(value: float, dtype: torch.dtype = torch.float32) -> nn.Linear:
    module = nn.Linear(2, 2, dtype=dtype)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(value)
    return module


def set_to(module: nn.Module, value: float) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(value)


def test_the_average_follows_its_formula() -> None:
    module = linear(0.0)
    ema = Ema(module, 0.9)
    set_to(module, 1.0)
    for updates in range(1, 30):
        ema.update()
        expected = torch.full((2, 2), 1 - 0.9**updates)
        assert torch.allclose(ema.average["weight"], expected, atol=1e-6)
    assert ema.updates == 29


def test_warm_up_forgets_the_start() -> None:
    module = linear(0.0)
    slow, quick = Ema(module, 0.999), Ema(module, 0.999, warmup=True)
    set_to(module, 1.0)
    for updates in range(50):
        decay = min(0.999, (1 + updates) / (10 + updates))
        before = quick.average["bias"][0].item()
        slow.update()
        quick.update()
        assert quick.average["bias"][0].item() == pytest.approx(decay * before + (1 - decay), abs=1e-5)
    assert slow.average["bias"][0] < 0.06
    assert quick.average["bias"][0] > 0.999


def test_the_average_of_16_bit_weights_is_kept_in_32_bits_and_moves() -> None:
    module = linear(0.0, torch.bfloat16)
    ema = Ema(module, 0.999)
    set_to(module, 1.0)
    for _ in range(2000):
        ema.update()
    assert ema.average["weight"].dtype == torch.float32
    assert ema.average["weight"][0, 0] == pytest.approx(1 - 0.999**2000, abs=1e-3)


def test_frozen_weights_are_not_averaged() -> None:
    module = linear(0.0)
    module.bias.requires_grad_(False)
    assert set(Ema(module, 0.9).average) == {"weight"}


def test_swapping_twice_changes_no_bit() -> None:
    module = nn.Linear(8, 8)
    ema = Ema(module, 0.9)
    nn.init.normal_(module.weight)
    ema.update()
    live = {name: p.detach().clone() for name, p in module.named_parameters()}
    average = {name: t.clone() for name, t in ema.average.items()}
    ema.swap()
    assert all(torch.equal(p, average[name]) for name, p in module.named_parameters())
    assert all(torch.equal(ema.average[name], live[name]) for name in live)
    ema.swap()
    assert all(torch.equal(p, live[name]) for name, p in module.named_parameters())
    assert all(torch.equal(ema.average[name], average[name]) for name in average)


def test_a_loaded_average_goes_on_exactly() -> None:
    module = nn.Linear(4, 4)
    ema = Ema(module, 0.99, warmup=True)
    saved, updates = {}, 0
    for step in range(12):
        nn.init.normal_(module.weight, generator=torch.Generator().manual_seed(step))
        ema.update()
        if step == 5:
            saved, updates = {name: t.clone() for name, t in ema.average.items()}, ema.updates
    other = Ema(module, 0.99, warmup=True)
    other.load(saved, updates)
    for step in range(6, 12):
        nn.init.normal_(module.weight, generator=torch.Generator().manual_seed(step))
        other.update()
    assert torch.equal(other.average["weight"], ema.average["weight"])
    assert other.updates == ema.updates
