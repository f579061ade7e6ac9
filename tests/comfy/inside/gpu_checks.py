"""Checks on a pretended GPU, under three budgets of memory each."""

from collections.abc import Callable
from typing import Any

import comfy.sd
import torch
from context import Context
from fake_gpu import BUDGETS, GPU, on_fake_gpu, where


def apply_fake(model: Any, budget: float) -> None:
    """Call the model on a fake GPU as a sampler does."""
    with on_fake_gpu(model, budget):
        text = torch.zeros(2, 7, 32, device=GPU)
        mask = torch.ones(2, 7, dtype=torch.long, device=GPU)
        x, sigma = torch.zeros(2, 16, 16, 15, device=GPU), torch.ones(2, device=GPU)
        positions = torch.zeros(2, 2, 16, 15, dtype=torch.int32, device=GPU)
        inner = model.model
        result = inner.apply_model(
            x, sigma, c_crossattn=text, context_mask=mask, pos_map=positions, transformer_options={}
        )
        assert result.shape == x.shape
        assert result.device == GPU
        assert result.dtype == torch.float32
        expected = {"all": {"cuda"}, "none": {"cpu"}}.get(name_of(budget))
        assert expected is None or where(inner.diffusion_model) >= expected, where(inner.diffusion_model)


def name_of(budget: float) -> str:
    return next(name for name, value in BUDGETS.items() if value == budget)


def model_on_fake_gpu(context: Context) -> None:
    for budget in BUDGETS.values():
        apply_fake(context.model(), budget)


def model_in_bfloat16_on_fake_gpu(context: Context) -> None:
    for budget in BUDGETS.values():
        model = context.model("bfloat16")
        model.model.manual_cast_dtype = None  # as on a GPU that computes in it
        apply_fake(model, budget)


def model_in_fp8_on_fake_gpu(context: Context) -> None:
    for budget in BUDGETS.values():
        apply_fake(context.model("fp8_e4m3fn"), budget)


def model_with_lora_on_fake_gpu(context: Context) -> None:
    for budget in BUDGETS.values():
        model, _ = comfy.sd.load_lora_for_models(context.model(), None, context.lora(), 1.0, 0.0)
        assert len(model.patches) == 5, sorted(model.patches)
        apply_fake(model, budget)


def vae_on_fake_gpu(context: Context) -> None:
    for budget in BUDGETS.values():
        for name, shape in (("encode", (1, 3, 64, 64)), ("decode", (1, 16, 8, 8))):
            vae = context.vae()
            with on_fake_gpu(vae.patcher, budget):
                result = getattr(vae.first_stage_model, name)(torch.zeros(shape, device=GPU))
                assert result.device == GPU


GPU_CHECKS: tuple[Callable[[Context], None], ...] = (
    model_on_fake_gpu,
    model_in_bfloat16_on_fake_gpu,
    model_in_fp8_on_fake_gpu,
    model_with_lora_on_fake_gpu,
    vae_on_fake_gpu,
)
