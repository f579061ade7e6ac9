"""flowcore's guidance rules inside ComfyUI's samplers.

A MODEL carries a plan; each sampling run makes its own rule from it, so that rules with a memory start fresh.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import comfy.model_patcher
import comfy.samplers
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ...flowcore.flow.guidance import Combine, cfg
from ...flowcore.flow.path import sigma_like

KEY = "flowcore_guidance"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How a model is guided: the rule, the steps without any velocity, the levels between which it holds."""

    make_rule: Callable[[], Combine] = lambda: cfg
    zero_init: int = 0
    interval: tuple[float, float] | None = None


def patched(model: ModelPatcher, **changes: Any) -> ModelPatcher:
    """Return a copy of the model whose plan has these changes."""
    copy = model.clone()
    copy.model_options[KEY] = replace(model.model_options.get(KEY, Plan()), **changes)
    copy.remove_wrappers_with_key(WrappersMP.OUTER_SAMPLE, KEY)
    copy.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, _run)
    return copy


def _run(executor: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    """Sample with the plan's rule in the place of ComfyUI's."""
    guider = executor.class_obj
    before = guider.model_options
    options = comfy.model_patcher.create_model_options_clone(before)
    plan: Plan = options[KEY]
    options["sampler_cfg_function"] = _cfg_function(plan)
    if plan.interval is not None:
        inner = options.get("sampler_calc_cond_batch_function", _calc_cond_batch)
        options["sampler_calc_cond_batch_function"] = _interval_function(plan.interval, inner)
    guider.model_options = options
    try:
        return executor(*args, **kwargs)
    finally:
        guider.model_options = before


def _cfg_function(plan: Plan) -> Callable[[dict[str, Any]], Tensor]:
    """Return ComfyUI's hook: of sigma times the two velocities, sigma times the guided one."""
    rule = plan.make_rule()

    def guide(args: dict[str, Any]) -> Tensor:
        sigma, scale = args["sigma"], args["cond_scale"]
        if plan.zero_init and _is_before(sigma, args["model_options"], plan.zero_init):
            return torch.zeros_like(args["cond"])
        if scale == 1 or not _is_inside(plan.interval, sigma):
            return args["cond"]
        level = sigma_like(sigma, args["cond"])
        return level * rule(args["cond"] / level, args["uncond"] / level, args["input"], sigma, scale)

    return guide


def _interval_function(
    interval: tuple[float, float], inner: Callable[[dict[str, Any]], list[Tensor]]
) -> Callable[[dict[str, Any]], list[Tensor]]:
    """Return ComfyUI's hook that computes the branches: outside the interval only the conditional one."""

    def compute(args: dict[str, Any]) -> list[Tensor]:
        if _is_inside(interval, args["sigma"]):
            return inner(args)
        only = inner({**args, "conds": args["conds"][:1]})[0]
        return [only] * len(args["conds"])

    return compute


def _calc_cond_batch(args: dict[str, Any]) -> list[Tensor]:
    return comfy.samplers.calc_cond_batch(
        args["model"], args["conds"], args["input"], args["sigma"], args["model_options"]
    )


def _is_inside(interval: tuple[float, float] | None, sigma: Tensor) -> bool:
    return interval is None or interval[0] <= float(sigma.flatten()[0]) <= interval[1]


def _is_before(sigma: Tensor, model_options: dict[str, Any], num_steps: int) -> bool:
    """Say whether a level belongs to the first steps of the run's grid."""
    grid = model_options["transformer_options"]["sample_sigmas"]
    end = float(grid[min(num_steps, len(grid) - 1)])
    return float(sigma.flatten()[0]) > end + 1e-6
