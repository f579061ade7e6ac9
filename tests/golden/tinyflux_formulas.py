"""Golden cases of TinyFlux's formulas: path, schedules, losses, stored features, averages, Sol's statistics.

The original counts time from noise (0) to data (1) and shifts towards the data; the project's functions take
noise levels, so that a shift of s is one of 1 / s, and velocities change sign.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from flowcore.flow import (
    interpolate,
    shift_sigma,
    shifted,
    sigma_grid,
    velocity_to_denoised,
    velocity_to_noise,
)
from flowcore.flow import variance_preserving as vp
from flowcore.flow.loss_weights import min_snr
from flowcore.flow.noise_levels import DEFAULT_FLOOR, LogitNormal, NoiseLaw, Uniform
from flowcore.models.tinyflux.experts import geometric_importance, geometric_temperature
from tests.golden.compare import CHAIN_LIMIT, Case, Metadata, Options, Tensors, part
from training.ema import Ema
from training.objectives import distillation
from training.optim import lr_multiplier

Compute = Callable[..., Tensor]
WARMUPS = {"lune": (0.1, 1000), "sol": (0.05, 2000)}


def cases(tensors: Tensors, metadata: Metadata, options: Options) -> Iterator[Case]:
    """Every output of one file, in float32; only the device is the caller's choice."""
    given = {name: value.to(options.device) for name, value in part(tensors, "input.").items()}
    config = json.loads(metadata["config"])
    patterns = {
        **flow_formulas(given, config),
        **vp_formulas(given),
        **loss_formulas(given, config),
        **teacher_formulas(given),
    }
    for name, expected in sorted(part(tensors, "output.").items()):
        limit = CHAIN_LIMIT if "loss" in name else None
        yield Case(f"output.{name}", compute(patterns, name), expected, limit)


def compute(patterns: Mapping[str, Compute], name: str) -> Tensor:
    """The value of the one pattern that the whole name fits; the groups are its arguments."""
    for pattern, function in patterns.items():
        match = re.fullmatch(pattern, name)
        if match:
            return function(*match.groups())
    raise LookupError(f"nothing computes output.{name}")


def attention_cases(tensors: Tensors, metadata: Metadata, options: Options) -> Iterator[Case]:
    """Statistics and map of a teacher's attention."""
    side = json.loads(metadata["config"])["spatial_size"]
    given = part(tensors, "input.attn.")
    maps = [given[name].to(options.device) for name in sorted(given, key=int)]
    stats, spatial = distillation.attention_statistics(maps, side)
    yield Case("output.stats", stats, tensors["output.stats"])
    yield Case("output.spatial", spatial, tensors["output.spatial"])


def data_times(law: NoiseLaw, u: Tensor) -> Tensor:
    """Training times of a law of noise levels, float32, from probabilities of data times."""
    return to_times(law.quantile(1 - u.double()))


def to_times(sigma: Tensor, floor: float = DEFAULT_FLOOR) -> Tensor:
    return (1 - sigma).float().clamp(floor, 1 - floor)


def flow_formulas(given: Tensors, config: Mapping[str, Any]) -> dict[str, Compute]:
    """Path, schedules, laws of times, and what training averages."""
    sigma = 1 - given["path_t"].double()
    sample = interpolate(given["data"].double(), given["noise"].double(), sigma)

    def logit_normal(index: str, dtype: torch.dtype = torch.float32) -> Tensor:
        mean, std, shift = config["variants_mean_std_shift"][int(index)]
        law = shifted(LogitNormal(-mean, std), 1 / shift)
        assert isinstance(law, LogitNormal)
        return to_times(law.from_normal(-given["normals"].double())).to(dtype).float()

    def stratified() -> Tensor:
        u = given["uniforms"].double()
        places = (torch.arange(len(u), device=u.device) + u) / len(u)
        return data_times(shifted(Uniform(), 1 / 3), places)

    def shifts(power: int) -> Tensor:
        """The shifts of noise levels that move the times by each shift, or back."""
        rows = [1 - shift_sigma(1 - given["t"].double(), s**power) for s in config["shifts"]]
        return torch.stack(rows).float()

    return {
        "x_t": sample.noised.float,
        "velocity": lambda: -sample.velocity.float(),
        "data_from_velocity": lambda: velocity_to_denoised(sample.velocity, sample.noised, sigma).float(),
        "noise_from_velocity": lambda: velocity_to_noise(sample.velocity, sample.noised, sigma).float(),
        "flux_shift": lambda: shifts(-1),
        "flux_unshift": lambda: shifts(1),
        r"logit_normal\.(\d+)": logit_normal,
        "logit_normal_bf16": lambda: logit_normal("0", torch.bfloat16),
        "uniform_shift3": lambda: data_times(shifted(Uniform(), 1 / 3), given["uniforms"]),
        "stratified_shift3": stratified,
        r"sampler_timesteps\.(\d+)": lambda steps: (1 - sigma_grid(int(steps), 1 / 3)).float(),
        r"min_snr\.([\d.]+)": lambda gamma: min_snr(1 - given["snr_t"].double(), float(gamma)).float(),
        r"lr\.(constant|cosine|linear)(?:_(coswarm))?(?:_min([\de.-]+))?": partial(
            learning_rates, given, config.get("lr", {})
        ),
        r"ema\.([\d.]+)\.shadow": partial(averaged, given),
    }


def vp_formulas(given: Tensors) -> dict[str, Compute]:
    """Predictions of variance-preserving teachers, through the straight path and back."""
    level = vp.alpha_bar_to_sigma(given["alpha_bar"].double())
    clean, noise = given["data"].double(), given["noise"].double()
    sample = interpolate(clean, noise, level)
    noised = vp.noised_to_vp(sample.noised, level)
    predicted = vp.velocity_to_vp_velocity(sample.velocity, sample.noised, level)

    def from_velocity(read: Compute) -> Tensor:
        return read(vp.vp_velocity_to_velocity(predicted, noised, level), sample.noised, level).float()

    def from_noise(read: Compute) -> Tensor:
        return read(vp.vp_noise_to_velocity(noise, noised, level), sample.noised, level).float()

    return {
        r"vpred\.x_t": noised.float,
        r"vpred\.velocity": predicted.float,
        r"vpred\.data": lambda: from_velocity(velocity_to_denoised),
        r"vpred\.noise": lambda: from_velocity(velocity_to_noise),
        "vpred_to_eps": lambda: from_velocity(velocity_to_noise),
        r"eps\.data": lambda: from_noise(velocity_to_denoised),
        "eps_to_vpred": lambda: from_noise(vp.velocity_to_vp_velocity),
    }


def learning_rates(
    given: Tensors, config: Mapping[str, Any], curve: str, warmup: str | None, minimum: str | None
) -> Tensor:
    """The factor on the learning rate at each of the steps."""
    return torch.tensor(
        [
            lr_multiplier(
                curve,
                step,
                steps=config["total_steps"],
                warmup_steps=config["warmup_steps"],
                minimum=float(minimum or 0) / config["base_lr"],
                warmup="cosine" if warmup else "linear",
            )
            for step in given["steps"].tolist()
        ]
    )


def averaged(given: Tensors, decay: str) -> Tensor:
    """The average after the updates."""
    module = nn.ParameterList([nn.Parameter(given[f"ema.{decay}.start"].clone())])
    ema = Ema(module, float(decay))
    for weights in given[f"ema.{decay}.updates"]:
        module[0].data = weights
        ema.update()
    return ema.average["0"]


def loss_formulas(given: Tensors, config: Mapping[str, Any]) -> dict[str, Compute]:
    """Losses, and how their weights rise."""
    side = given["mask"].shape[-1]

    def as_grid(tokens: Tensor) -> Tensor:
        return rearrange(tokens, "b (h w) c -> b c h w", w=side)

    def main(name: str) -> Tensor:
        """The loss by its parameters: `all` takes all of the parts, other names say which."""
        settings = config["main_loss"][name]
        parts = {"huber", "snr", "mask", "spatial"} if name == "all" else set(name.split("_"))
        return distillation.velocity_loss(
            as_grid(given["pred"]),
            as_grid(given["data"] - given["noise"]),
            huber_delta=settings["delta"] if "huber" in parts else None,
            importance=given["spatial_weights"] if "spatial" in parts else None,
            mask=given["mask"] if "mask" in parts else None,
            mask_weights=(settings.get("fg", 2.0), settings.get("bg", 0.5)),
            weights=min_snr(1 - given["path_t"], settings["gamma"]) if "snr" in parts else None,
        )

    def lune(mode: str) -> Tensor:
        delta = config["lune_huber_delta"]
        return distillation.lune_loss(given["lune_pred"], given["lune_target"], mode, huber_delta=delta)

    def sol(weights: str | None) -> Tensor:
        parts = [
            tuple(given[f"sol_{whose}_{part}"] for part in ("stats", "spatial"))
            for whose in ("pred", "target")
        ]
        return distillation.sol_loss(
            *parts, part_weights=tuple(config["sol_loss_w"]) if weights else (1.0, 1.0)
        )

    def rising(expert: str) -> Tensor:
        weight, warmup = WARMUPS[expert]
        return torch.tensor([distillation.ramp(weight, s, warmup) for s in given["steps"].tolist()])

    return {
        r"main_loss\.(\w+)": main,
        r"lune_loss\.(\w+)": lune,
        r"sol_loss(_w)?": sol,
        r"(lune|sol)_weight": rising,
    }


def teacher_formulas(given: Tensors) -> dict[str, Compute]:
    """Stored features between times, and the formulas that stand for a teacher."""

    def stored(name: str) -> Tensor:
        buckets, rows, times = (given[f"cache.{part}"] for part in ("t_buckets", "indices", "t"))
        return distillation.interpolate_buckets(given[f"cache.{name}"], buckets, rows, times)

    def by_formula(part: str) -> Tensor:
        return distillation.geometric_statistics(given["sol_t"], 8)[("stats", "spatial").index(part)]

    return {
        r"cache\.(\w+)": stored,
        r"sol_geometric\.(\w+)": by_formula,
        r"prior\.geometric_spatial_(\d+)": lambda side: geometric_importance(given["sol_t"], int(side)),
        r"prior\.geometric_temperature_(\d+)heads": lambda heads: geometric_temperature(
            given["sol_t"], int(heads)
        ),
    }
