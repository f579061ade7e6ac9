"""Golden cases of TinyFlux: whole models, a sampler, a training step, a LoRA; formulas are beside."""

import json
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from flowcore.conditioning import Conditioning
from flowcore.flow import guided, interpolate, sigma_grid
from flowcore.flow.loss_weights import min_snr
from flowcore.flow.solvers import euler
from flowcore.models.tinyflux import TinyFlux, TinyFluxConfig, velocity, velocity_and_experts
from flowcore.models.tinyflux.config import config_differences
from flowcore.models.tinyflux.lora import LoraConfig, learning_rates
from flowcore.weights.checkpoint import LoadedModel
from flowcore.weights.lora import merge, parse_lora, restore
from flowcore.weights.lora_delta import Change
from tests.golden import tinyflux_formulas
from tests.golden.compare import (
    CHAIN_LIMIT,
    WHOLE_MODEL_LIMITS,
    Case,
    Checked,
    Metadata,
    Options,
    Outcome,
    Skipped,
    Tensors,
    load,
    part,
    stored_config,
)
from training.objectives.distillation import lune_loss, ramp, sol_loss, velocity_loss

NOT_WHOLE = "only whole forwards have a limit in this dtype"


def cases(tensors: Tensors, metadata: Metadata, options: Options) -> Iterator[Outcome]:
    """Every output of one file."""
    kinds = {
        "model": model_cases,
        "sampler": sampler_cases,
        "train_step": step_cases,
        "lora": lora_cases,
        "flow_math": tinyflux_formulas.cases,
        "sol_attention_stats": tinyflux_formulas.attention_cases,
    }
    yield from kinds[metadata["kind"]](tensors, metadata, options)


def check_config(loaded: LoadedModel, metadata: Metadata) -> Checked:
    """Whether the configuration read from the tensors is the one the file states."""
    return Checked("config", "; ".join(config_differences(loaded.config, stored_config(metadata))))


def timed_forward(tensors: Tensors, metadata: Metadata, options: Options) -> Callable[[], Tensor] | None:
    """One forward of a whole model, for the command to time."""
    if metadata["kind"] != "model":
        return None
    model = load(tensors, metadata, options).model
    forward = torch.compile(model.forward) if options.compile else model.forward
    inputs = model_inputs(model, tensors, metadata, options)
    return lambda: forward(**inputs)


def model_inputs(model: nn.Module, tensors: Tensors, metadata: Metadata, options: Options) -> dict[str, Any]:
    """The arguments of the forward. The original passes guidance to models without a layer for it."""
    given = {name: value.to(options.device) for name, value in part(tensors, "input.").items()}
    if "expert_features" in given:  # version 3's name
        given["lune_features"] = given.pop("expert_features")
    inputs: dict[str, Any] = dict(given)
    for name in ("hidden_states", "encoder_hidden_states", "pooled_projections"):
        inputs[name] = options.cast(given[name])
    if not model.config.guidance_embeds:
        inputs.pop("guidance", None)
    if "height" in metadata:
        inputs["size"] = (int(metadata["height"]), int(metadata["width"]))
    return inputs


def model_cases(tensors: Tensors, metadata: Metadata, options: Options) -> Iterator[Outcome]:
    """Configuration, velocity, and what the predictors say."""
    loaded = load(tensors, metadata, options)
    yield check_config(loaded, metadata)
    forward = torch.compile(loaded.model.forward) if options.compile else loaded.model.forward
    with torch.no_grad():
        result, info = forward(
            **model_inputs(loaded.model, tensors, metadata, options), return_expert_pred=True
        )
    if "expert_used" in metadata:
        used = info["lune"]["expert_used"]
        yield Checked("expert_used", "" if used == metadata["expert_used"] else f"{used} instead")
    limit = WHOLE_MODEL_LIMITS[options.dtype]
    for name, expected in sorted(part(tensors, "output.").items()):
        expert, _, value = name.partition(".")
        if name == "velocity":
            yield Case("output.velocity", result.float(), expected, limit)
        elif options.dtype != torch.float32:
            yield Skipped(f"output.{name}", NOT_WHOLE)
        else:
            yield Case(f"output.{name}", info[expert][value], expected)


def sampler_cases(tensors: Tensors, metadata: Metadata, options: Options) -> Iterator[Outcome]:
    """Euler steps with classifier-free guidance, by the project's sampler in its own direction of time."""
    loaded = load(tensors, metadata, options)
    yield check_config(loaded, metadata)
    names = ("timesteps", "trajectory", "latent")
    if options.dtype != torch.float32:
        yield from (Skipped(f"output.{name}", NOT_WHOLE) for name in names)
        return
    given = {name: value.to(options.device) for name, value in part(tensors, "input.").items()}
    height = int(metadata["height"])

    def branch(kind: str) -> Callable[[Tensor, Tensor], Tensor]:
        told = Conditioning(context=given[f"{kind}_t5"], pooled=given[f"{kind}_clip"])
        return lambda x, sigma: velocity(loaded.model.forward, x, sigma, told)

    states: list[Tensor] = []
    sigmas = sigma_grid(int(metadata["num_steps"]), 1 / float(metadata["shift"]))
    noise = rearrange(given["noise_tokens"], "b (h w) c -> b c h w", h=height)
    scale = float(metadata["guidance_scale"])
    mixed = guided(branch("cond"), branch("uncond"), scale) if scale > 1 else branch("cond")
    with torch.no_grad():
        latents = euler(mixed, noise, sigmas, callback=lambda state: states.append(state.x.clone()))
    states = [*states[1:], latents]  # the callback sees the state before its step
    trajectory = rearrange(torch.stack(states), "k b c h w -> k b (h w) c")
    for name, actual in zip(names, ((1 - sigmas).float(), trajectory, latents), strict=True):
        yield Case(f"output.{name}", actual, tensors[f"output.{name}"], CHAIN_LIMIT)


def step_cases(tensors: Tensors, metadata: Metadata, options: Options) -> Iterator[Outcome]:
    """Losses and gradients of one training step."""
    loaded = load(tensors, metadata, options)
    yield check_config(loaded, metadata)
    if options.dtype != torch.float32:
        yield from (Skipped(name, NOT_WHOLE) for name in sorted(tensors) if name.startswith("output."))
        return
    model, settings = loaded.model.train(), json.loads(metadata["train"])
    assert isinstance(model, TinyFlux)
    given = {name: value.to(options.device) for name, value in part(tensors, "input.").items()}
    computed = step_values(model, given, settings)
    untouched = {name for name, p in model.named_parameters() if p.grad is None}
    yield Checked("parameters without gradient", no_gradient_fault(untouched, settings["no_grad_params"]))
    for name in sorted(set(computed) & set(part(tensors, "output."))):
        yield Case(f"output.{name}", computed[name], tensors[f"output.{name}"], CHAIN_LIMIT)


def no_gradient_fault(untouched: set[str], stated: list[str]) -> str:
    return "" if untouched == set(stated) else f"{sorted(untouched)} instead of {stated}"


def step_values(model: TinyFlux, given: Tensors, settings: dict[str, Any]) -> dict[str, Tensor]:
    """Velocity, losses and norms of gradients by the original's names and in its direction."""
    latents = given["latents"]
    grid_noise = rearrange(given["noise"], "b (h w) c -> b c h w", h=latents.shape[2])
    sigma = 1 - given["timestep"]
    sample = interpolate(latents, grid_noise, sigma)
    taught = {name: given[name] for name in ("lune_features", "sol_stats", "sol_spatial") if name in given}
    told = Conditioning(context=given["t5_embeds"], pooled=given["clip_pooled"], extras=taught)
    generator = torch.Generator(latents.device).manual_seed(0)
    predicted, experts = velocity_and_experts(model.forward, sample.noised, sigma, told, generator=generator)

    losses = {
        "main": velocity_loss(
            predicted,
            sample.velocity,
            huber_delta=settings["huber_delta"] if settings["use_huber_loss"] else None,
            importance=given.get("sol_spatial") if settings["use_spatial_weighting"] else None,
            mask=given.get("mask"),
            weights=min_snr(sigma, settings["snr_gamma"]) if settings["use_snr_weighting"] else None,
        )
    }
    total = losses["main"]
    if "lune_features" in given:
        predicted_features = experts["lune"]["expert_pred"]
        losses["lune"] = lune_loss(predicted_features, given["lune_features"], settings["lune_mode"])
    if "sol_stats" in given and "sol_spatial" in given:
        guesses = (experts["sol"]["pred_stats"], experts["sol"]["pred_spatial"])
        losses["sol"] = sol_loss(guesses, (given["sol_stats"], given["sol_spatial"]))
    for name in ("lune", "sol"):
        if name in losses:
            weight, warmup = settings[f"{name}_weight"], settings[f"{name}_warmup_steps"]
            total = total + ramp(weight, settings["step"], warmup) * losses[name]
    total.backward()
    norms = {name: p.grad.norm() for name, p in model.named_parameters() if p.grad is not None}
    return {
        "velocity": -rearrange(predicted, "b c h w -> b (h w) c"),
        "loss.total": total,
        "grad_norm_total": torch.stack(list(norms.values())).norm(),
        **{f"loss.{name}": value for name, value in losses.items()},
        **{f"grad_norm.{name}": value for name, value in norms.items()},
    }


def lora_cases(tensors: Tensors, metadata: Metadata, options: Options) -> Iterator[Outcome]:
    """A model with a LoRA beside its layers, then merged into them."""
    loaded = load(tensors, metadata, options)
    model, stated = loaded.model, metadata["lora_config"]
    yield check_config(loaded, metadata)
    yield Checked("learning rates", rates_fault(loaded.config, json.loads(stated), metadata))
    lora = parse_lora(
        part(tensors, "lora."),
        {"config_json": stated},
        model.state_dict(),
        loaded.architecture,
        source="lora",
    )
    unused = [key for key in lora.unused if not key.startswith("ext_")]  # blocks that no forward runs
    yield Checked("keys", f"unused: {unused}" if unused else "")
    inputs = model_inputs(model, tensors, metadata, options)
    with torch.no_grad():
        handles = [add_beside(model, change) for change in lora.changes]
        beside = model(**inputs)
        for handle in handles:
            handle.remove()
        originals = merge(model, lora)
        merged = model(**inputs)
        restore(model, originals)
    yield Checked("restored weights", restored_fault(model, part(tensors, "weight.")))
    limit = WHOLE_MODEL_LIMITS[options.dtype]
    yield Case("output.velocity", beside.float(), tensors["output.velocity"], limit)
    yield Case("output.velocity_merged", merged.float(), tensors["output.velocity_merged"], limit)


def add_beside(model: nn.Module, change: Change) -> RemovableHandle:
    """Add an adapter's product to what its layer puts out."""
    down, up = change.parts["down"], change.parts["up"]
    scale = (change.alpha or down.shape[0]) / down.shape[0]

    def hook(_module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        x = inputs[0]
        return output + scale * (x @ down.to(x).T @ up.to(x).T)

    return model.get_submodule(change.parameter.removesuffix(".weight")).register_forward_hook(hook)


def rates_fault(config: TinyFluxConfig, stated: dict[str, Any], metadata: Metadata) -> str:
    """How the groups of learning rates differ from those that the file states."""
    specs = LoraConfig.from_dict(stated).resolve(config.num_double_layers, config.num_single_layers)
    expected = sorted((group["lr"], group["params"]) for group in json.loads(metadata["param_groups"]))
    base = expected[0][0] / min(spec.lr_scale for spec in specs.values())
    groups = sorted(
        (rate, 2 * sum(specs[path].depth for path in paths))
        for rate, paths in learning_rates(specs, base).items()
    )
    same = [
        math.isclose(rate, lr) and count == size
        for (rate, count), (lr, size) in zip(groups, expected, strict=False)
    ]
    return "" if all(same) and len(groups) == len(expected) else f"{groups} instead of {expected}"


def restored_fault(model: nn.Module, weights: Tensors) -> str:
    """Names of weights that are not what they were before the merge."""
    state = model.state_dict()
    changed = [
        name
        for name, tensor in weights.items()
        if not torch.equal(state[name].cpu(), tensor.to(state[name].dtype))
    ]
    return f"changed: {changed[:3]}" if changed else ""
