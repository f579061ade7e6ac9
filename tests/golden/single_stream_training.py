"""Golden cases of SingleStreamDiT's losses, samplers, buckets and learning rates."""

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from flowcore.flow import (
    cfg,
    euler,
    guided_pair,
    interpolate,
    rk4_reference,
    shift_sigma,
    sigma_grid,
    velocity_to_denoised,
)
from tests.golden.compare import CHAIN_LIMIT, Case, Checked, Metadata, Options, Tensors, part
from training.data.ratio_buckets import nearest_ratio, place, ratio_buckets
from training.objectives import frequency_losses as losses
from training.optim import lr_multiplier

SAMPLERS = {"euler": euler, "rk4": rk4_reference}


def toy(numbers: list[float], x: Tensor, time: Tensor, text: Tensor) -> Tensor:
    """The network of the files: a x cos(t) + b t + c mean(text) sin(x), in data time."""
    a, b, c = numbers
    time = time[:, None, None, None]
    mean = text.mean(dim=(1, 2))[:, None, None, None]
    return a * x * time.cos() + b * time + c * mean * x.sin()


def loss_cases(tensors: Tensors, metadata: Metadata, options: Options) -> Iterator[Case]:
    """Losses, their gradients, the teacher's target, and prepared batches."""
    given = {name: value.to(options.device) for name, value in part(tensors, "input.").items()}
    config = json.loads(metadata["config"])
    computed = plain_losses(given) | spectral_losses(given, config) | taught(given, config)
    computed |= totals(given, config)
    for shift in (1, 3):
        computed |= {
            f"batch_shift{shift}.{name}": value for name, value in batch(given, config, shift).items()
        }
    for name, expected in part(tensors, "output.").items():
        if name in computed:
            yield Case(f"output.{name}", computed[name], expected, CHAIN_LIMIT)


def plain_losses(given: Tensors) -> dict[str, Tensor]:
    """Losses on the velocity."""
    kinds = ("mse", "l1", "huber")
    return {kind: losses.velocity_loss(kind, given["v_pred"], given["target"]) for kind in kinds}


def estimate(given: Tensors, predicted: Tensor) -> Tensor:
    """The clean estimate of a velocity in data time."""
    return velocity_to_denoised(-predicted, given["x_t"], 1 - given["t"])


def spectral_losses(given: Tensors, config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Losses on the clean estimate's spectrum, with the gradient of their sum."""
    sigma, clean = 1 - given["t"], given["x_1"]
    denoised = estimate(given, given["v_pred"]).requires_grad_()
    amplitude = config["fal_lambda"] * losses.amplitude_loss(denoised, clean, sigma)
    coherence = config["fcl_lambda"] * losses.coherence_loss(denoised, clean, sigma)
    (gradient,) = torch.autograd.grad(amplitude + coherence, denoised)
    return {
        "x_hat_1": denoised.detach(),
        "fal": amplitude.detach(),
        "fcl": coherence.detach(),
        "grad_fal_plus_fcl_x_hat": gradient,
    }


def teacher(given: Tensors, config: Mapping[str, Any]) -> Callable[[Tensor, Tensor], Tensor]:
    """The averaged network's guided velocity, in the project's convention."""

    def velocity(x: Tensor, sigma: Tensor) -> Tensor:
        texts = given["text_embeds"], torch.zeros_like(given["text_embeds"])
        pair = (-toy(config["teacher_abc"], x, 1 - sigma, text) for text in texts)
        return cfg(*pair, x, sigma, config["self_eval_cfg"])

    return velocity


def taught(given: Tensors, config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Self-evaluation in V3's form, and what HEAD's form comes to."""
    predicted = given["v_pred"].clone().requires_grad_()
    denoised = estimate(given, predicted)
    found = losses.self_evaluation(
        denoised, given["x_1"], given["noise_s"], 1 - given["t"], given["u_s"], teacher(given, config)
    )
    loss = (denoised - found.target).square().mean()
    (gradient,) = torch.autograd.grad(loss, predicted)
    return {
        "s": 1 - found.sigma,
        "self_eval_v3_target": found.target,
        "self_eval_v3_weight": found.weight,
        "self_eval_v3_unscaled": loss.detach(),
        "grad_self_eval_v3_v_pred": gradient,
        "self_eval_head": config["self_eval_lambda"] * (denoised.detach() - given["x_1"]).square().mean(),
    }


def totals(given: Tensors, config: Mapping[str, Any]) -> dict[str, Tensor]:
    """HEAD's sum of losses, before and after the epoch from which on it evaluates itself."""
    predicted = -toy(config["student_abc"], given["x_t"], given["t"], given["text_embeds"])
    values = {}
    for name in ("on", "off"):
        setting = config[f"total_{name}"]
        is_on = setting["epoch"] > setting["epochs"] * setting["start"]
        mix = losses.LossMix(
            velocity=setting["loss_type"],
            amplitude=config["fal_lambda"],
            coherence=config["fcl_lambda"],
            self_evaluation=config["self_eval_lambda"] if is_on else 0.0,
        )
        total = losses.mixed_loss(
            mix, predicted, given["x_1"], given["x_0"], 1 - given["t"], estimate_target=given["x_1"]
        )
        values[f"total_head_selfeval_{name}"] = total / setting["accum"]
    return values


def batch(given: Tensors, config: Mapping[str, Any], shift: float) -> dict[str, Tensor]:
    """Time, noised latents and target of a training batch, in data time."""
    time = shift_sigma(given["u_s"], shift)
    noise = losses.add_offset(given["x_0"], given["offset_noise"], config["offset_noise"])
    sample = interpolate(given["x_1"], noise, 1 - time)
    return {"t": time, "x_t": sample.noised, "target": -sample.velocity}


def sampler_cases(tensors: Tensors, metadata: Metadata, options: Options) -> Iterator[Case]:
    """Guided runs of the reference: uniform steps, at each of which the network is told the shifted time."""
    given = {name: value.to(options.device) for name, value in part(tensors, "input.").items()}
    config = json.loads(metadata["config"])
    for run in config["runs"]:
        times: list[Tensor] = []
        solver = SAMPLERS[run["sampler"]]
        result = solver(
            run_velocity(given, config["abc"], run, times), given["noise"], sigma_grid(run["steps"])
        )
        name = f"output.{run['name']}"
        yield Case(name, result, tensors[name], CHAIN_LIMIT)
        yield Case(f"{name}.t_calls", torch.cat(times).double(), tensors[f"{name}.t_calls"], CHAIN_LIMIT)


def run_velocity(
    given: Tensors, numbers: list[float], run: Mapping[str, Any], times: list[Tensor]
) -> Callable[[Tensor, Tensor], Tensor]:
    """The guided velocity of one run; times takes up what the network is told."""
    negative = given["neg"] if run.get("neg") else torch.zeros_like(given["cond"])

    def told(sigma: Tensor) -> Tensor:
        time = shift_sigma(1 - sigma, run["shift"])
        times.append(time)
        return time

    def pair(x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        time = told(sigma)
        return -toy(numbers, x, time, given["cond"]), -toy(numbers, x, time, negative)

    def conditional(x: Tensor, sigma: Tensor) -> Tensor:
        return -toy(numbers, x, told(sigma), given["cond"])

    return guided_pair(pair, conditional, run["cfg"])


def document_cases(document: Mapping[str, Any], _options: Options) -> Iterator[Case | Checked]:
    """Sizes of pictures, or learning rates."""
    kinds = {"buckets": bucket_cases, "lr_schedule": rate_cases}
    yield from kinds[document["kind"]](document)


def bucket_cases(document: Mapping[str, Any]) -> Iterator[Checked]:
    """The buckets of each target, and where each image goes."""
    for target, entry in document["targets"].items():
        buckets = ratio_buckets(int(target), document["stride"])
        ours = [[bucket.width, bucket.height] for bucket in buckets]
        areas = [width * height for width, height in entry["buckets"]]
        is_same = sorted(ours) == sorted(entry["buckets"]) and areas == [w * h for w, h in ours]
        yield Checked(f"{target}: buckets", "" if is_same else f"{ours} instead of {entry['buckets']}")
        for row in entry["rows"]:
            bucket = nearest_ratio(*row["size"], buckets)
            placement = place(*row["size"], bucket)
            found = {
                "bucket": [bucket.width, bucket.height],
                "resize": list(placement.size),
                "crop": list(placement.box),
            }
            expected = corrected(row) if "reference_defect" in row else {name: row[name] for name in found}
            wrong = [
                f"{name} {found[name]} instead of {expected[name]}"
                for name in found
                if found[name] != expected[name]
            ]
            yield Checked(f"{target}: {row['size'][0]}x{row['size'][1]}", "; ".join(wrong))


def corrected(row: Mapping[str, Any]) -> dict[str, list[int]]:
    """A row in which the reference leaves an image short of its bucket, as it should be."""
    width, height = (max(have, need) for have, need in zip(row["resize"], row["bucket"], strict=True))
    left, top = (width - row["bucket"][0]) // 2, (height - row["bucket"][1]) // 2
    box = [left, top, left + row["bucket"][0], top + row["bucket"][1]]
    return {"bucket": row["bucket"], "resize": [width, height], "crop": box}


def rate_cases(document: Mapping[str, Any]) -> Iterator[Case]:
    """The learning rates that a run logged."""
    for stage in document["stages"]:
        curve = {"steps": stage["total_steps"], "warmup_steps": stage["warmup_steps"]}
        rates = [
            stage["base_lr"] * lr_multiplier("cosine", row["optimizer_steps_done"], **curve)
            for row in stage["rows"]
        ]
        logged = torch.tensor([row["lr"] for row in stage["rows"]], dtype=torch.float64)
        yield Case(f"{stage['name']}: rates", torch.tensor(rates, dtype=torch.float64), logged)
