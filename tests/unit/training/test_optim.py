"""Learning-rate curves, parameter groups, the muP rule, and optimizer state as tensors."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from flowcore.errors import ConfigError
from flowcore.models import find_architecture
from training.config import Group, Optimizer
from training.optim import OptimizerSet, base_lr, fan_in, lr_multiplier, plan_groups

# The HDM recipe's curve: warm-up 1,000, cosine to 0.01 at step 20,001.
HDM_CURVE = {
    0: 0.0,
    1: 0.001,
    500: 0.5,
    999: 0.999,
    1000: 1.0,
    1001: 0.9999999932341552,
    5000: 0.8956351347929495,
    10500: 0.5050409212241923,
    15000: 0.16978999233559233,
    19999: 0.010000027063379014,
    20000: 0.010000006765844794,
    20001: 0.01,
    25000: 0.01,
}
# The seed's: base 0.5 / 896, warm-up 1,000, cosine to 0 at step 1,250,000.
SEED_CURVE = {
    0: 0.0,
    99: 5.5245535714285714e-05,
    500: 0.00027901785714285713,
    1000: 0.0005580357142857143,
    50699: 0.000555858473074786,
    188399: 0.0005276089741997441,
    625500: 0.00027901785714285713,
    1249999: 8.82633500017985e-16,
}


@pytest.mark.parametrize("step", HDM_CURVE)
def test_the_curve_of_the_hdm_recipe(step: int) -> None:
    value = lr_multiplier("cosine", step, steps=20001, warmup_steps=1000, minimum=0.01)
    assert value == pytest.approx(HDM_CURVE[step], rel=1e-12)


@pytest.mark.parametrize("step", SEED_CURVE)
def test_the_curve_of_the_seed(step: int) -> None:
    value = 0.5 / 896 * lr_multiplier("cosine", step, steps=1_250_000, warmup_steps=1000)
    assert value == pytest.approx(SEED_CURVE[step], rel=1e-6, abs=1e-18)


@pytest.mark.parametrize("name", ["constant", "linear", "cosine"])
def test_curves_rise_stay_in_range_and_end_at_their_minimum(name: str) -> None:
    values = [lr_multiplier(name, step, steps=100, warmup_steps=10, minimum=0.2) for step in range(150)]
    assert values[:11] == [step / 10 for step in range(11)]
    assert values[10:] == sorted(values[10:], reverse=True)
    assert all(0 <= value <= 1 for value in values)
    assert values[100] == values[149] == (1 if name == "constant" else pytest.approx(0.2))


def test_the_linear_curve_is_halfway_in_the_middle() -> None:
    assert lr_multiplier("linear", 55, steps=100, warmup_steps=10) == pytest.approx(0.5)


def test_a_curve_shorter_than_its_warm_up_ends_after_it() -> None:
    assert lr_multiplier("cosine", 5, steps=5, warmup_steps=10) == 0.5
    assert lr_multiplier("cosine", 10, steps=5, warmup_steps=10) == 0


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((), 1), ((896,), 896), ((3072, 896), 896), ((896, 4, 2, 2), 16), ((1, 16, 2), 32), ((5, 0), 0)],
)
def test_fan_in(shape: tuple[int, ...], expected: int) -> None:
    assert fan_in(shape) == expected


def test_fan_in_rates_of_xut_small() -> None:
    architecture = find_architecture("xut")
    model = architecture.model(architecture.presets["xut-small"], device="meta")
    plans = plan_groups(model.named_parameters(), Optimizer(lr=0.5, rule="fan_in"))
    rates = {name: plan.lr for plan in plans for name in plan.names}
    assert set(rates) == {name for name, _ in model.named_parameters()}
    block = "backbone.dec_blocks.0.0"
    expected = {
        f"{block}.mlp.w3.weight": 1.6276e-4,
        f"{block}.mlp.w12.bias": 8.138e-5,
        f"{block}.mlp.w12.weight": 5.5804e-4,
        f"{block}.attn.out.weight": 5.5804e-4,
        "ctx_proj.weight": 7.8125e-4,
        "in_patch.proj.weight": 3.125e-2,
        "shared_adaln_attn.3.weight": 1.3951e-4,
        "shared_adaln_attn.1.bias": 1.3951e-4,
        "shared_adaln_attn.3.bias": 1.8601e-4,
    }
    for name, rate in expected.items():
        assert rates[name] == pytest.approx(rate, rel=1e-4), name


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 2))


def test_the_first_matching_pattern_decides() -> None:
    config = Optimizer(
        name="adamw",
        lr=1e-3,
        groups=(Group(pattern=r"^0\.", lr=2e-3, weight_decay=0.0), Group(pattern="bias", name="sgd", lr=0.1)),
    )
    plans = plan_groups(small().named_parameters(), config)
    found = {name: (plan.optimizer, plan.lr, plan.weight_decay) for plan in plans for name in plan.names}
    assert found == {
        "0.weight": ("adamw", 2e-3, 0.0),
        "0.bias": ("adamw", 2e-3, 0.0),
        "1.weight": ("adamw", 1e-3, 0.01),
        "1.bias": ("sgd", 0.1, 0.01),
        "2.weight": ("adamw", 1e-3, 0.01),
        "2.bias": ("sgd", 0.1, 0.01),
    }


def test_a_pattern_that_matches_nothing_is_an_error() -> None:
    config = Optimizer(groups=(Group(pattern="bias"), Group(pattern="attn")))
    with pytest.raises(ConfigError, match=r"optimizer\.groups: pattern must match a trainable .*got 'attn'"):
        plan_groups(small().named_parameters(), config)


def test_muon_refuses_what_is_no_matrix() -> None:
    with pytest.raises(ConfigError, match=r"muon takes matrices only, got 0\.bias .*add a group"):
        plan_groups(small().named_parameters(), Optimizer(name="muon"))


def test_frozen_parameters_are_in_no_group() -> None:
    module = small()
    module[0].requires_grad_(False)
    optimizers = OptimizerSet(module, Optimizer())
    assert {name for plan in optimizers.plans for name in plan.names} == {
        "1.weight",
        "1.bias",
        "2.weight",
        "2.bias",
    }


def train(module: nn.Module, optimizers: OptimizerSet, steps: range) -> None:
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        loss = module(torch.randn(8, 4, generator=generator)).square().mean()
        loss.backward()
        optimizers.step(lr_multiplier("cosine", step, steps=20, warmup_steps=3), scaler)


CONFIGS = {
    "adamw": Optimizer(lr=1e-2),
    "sgd": Optimizer(name="sgd", lr=1e-2),
    "sgd without momentum": Optimizer(name="sgd", lr=1e-2, betas=(0.0, 0.0)),
    "muon": Optimizer(
        name="muon", lr=1e-2, groups=(Group(pattern="bias|1\\.", name="adamw", lr=1e-3, rule="fan_in"),)
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_state_as_tensors_continues_bit_for_bit(name: str) -> None:
    config = CONFIGS[name]
    module = small()
    optimizers = OptimizerSet(module, config)
    train(module, optimizers, range(6))
    tensors = {key: value.clone() for key, value in optimizers.state_tensors().items()}
    other = copy.deepcopy(module)
    train(module, optimizers, range(6, 12))
    resumed = OptimizerSet(other, config)
    resumed.load_state_tensors(tensors, lambda whole, _: whole)
    train(other, resumed, range(6, 12))
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), other.parameters(), strict=True))


def test_the_multiplier_scales_every_rate() -> None:
    module = small()
    optimizers = OptimizerSet(module, CONFIGS["muon"])
    module(torch.ones(1, 4)).sum().backward()
    optimizers.step(0.25, torch.amp.GradScaler("cpu", enabled=False))
    rates = {group["lr"] / group["base_lr"] for o in optimizers.optimizers for group in o.param_groups}
    assert rates == {0.25}
    assert all(parameter.grad is None for parameter in module.parameters())


def test_weight_decay_shrinks_weights_without_gradient() -> None:
    module = nn.Linear(2, 2)
    before: Tensor = module.weight.detach().clone()
    optimizers = OptimizerSet(module, Optimizer(lr=0.1, weight_decay=0.5))
    module.weight.grad, module.bias.grad = torch.zeros(2, 2), torch.zeros(2)
    optimizers.step(1.0, torch.amp.GradScaler("cpu", enabled=False))
    assert torch.allclose(module.weight, before * (1 - 0.1 * 0.5))
    assert math.isclose(optimizers.plans[0].weight_decay, 0.5)


def test_warmup_in_half_a_wave() -> None:
    factors = [
        lr_multiplier("constant", s, steps=100, warmup_steps=10, warmup="cosine") for s in (0, 5, 9, 10)
    ]
    assert factors == pytest.approx([0.0, 0.5, 0.97553, 1.0], abs=1e-5)


def test_the_rates_of_the_source_replace_all_others() -> None:
    groups = [{"pattern": "bias", "lr": 0.5, "weight_decay": 0.0}, {"pattern": "weight", "rule": "fan_in"}]
    table = {"lr": 0.1, "groups": groups, "reference_lr": 0.02, "lr_profile": "reference"}
    config = Optimizer.model_validate(table)
    plans = plan_groups(nn.Linear(4, 2).named_parameters(), config)
    assert {plan.names: (plan.lr, plan.weight_decay) for plan in plans} == {
        ("weight",): (0.005, 0.01),
        ("bias",): (0.02, 0.0),
    }
    assert base_lr(config) == 0.02
    assert base_lr(config.model_copy(update={"lr_profile": "own"})) == 0.1
