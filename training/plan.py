"""The plan of a run: what `--dry-run` prints, found without writing or encoding anything."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

from flowcore.conditioning import Conditioning
from flowcore.models.exo import Exo
from flowcore.models.exo.trunk import build_trunk
from flowcore.ops import DEFAULT_RUNTIME, Runtime, run_checkpointed
from training.assemble import Prepared
from training.config import LoopConfig, RunConfig
from training.data.buckets import Bucket, crop_and_zoom
from training.data.latents import latent_cell
from training.loop import DTYPES
from training.optim import plan_groups
from training.stages import stages_of, trained_names

_ALL = ("weights", "gradients", "optimizer", "ema")
DIVIDED = {"zero2": ("gradients", "optimizer"), "zero3": _ALL, "fsdp2": _ALL}
"""What strategies divide by the processes."""
OPTIMIZER_BYTES = {"adamw": 8, "muon": 4, "sgd": 4}
TEXT_TOKENS = 64
"""Tokens of a caption that activations are counted for, where the model takes as many."""
HALF_SHARE = 0.6
"""Saved tensors under mixed precision: products are in 16 bits, norms and the residual stream in 32."""
MAX_CROP, MAX_ZOOM = 1 / 3, 1.5


def make_plan(prepared: Prepared, processes: int = 1) -> dict[str, Any]:
    """The plan as JSON-like values; memory in bytes, of each process, bucket sizes in pixels."""
    config = prepared.config
    module = meta_model(prepared)
    train_stages(module, config)
    buckets = Counter(prepared.buckets)
    return {
        "arch": prepared.architecture.name,
        "parameters": sum(p.numel() for p in module.parameters()),
        "trainable_parameters": sum(p.numel() for p in module.parameters() if p.requires_grad),
        "memory": memory(module, prepared, max(buckets, key=lambda b: b.width * b.height), processes),
        "steps": config.train.steps,
        "epochs": config.train.steps * config.train.batch_size / len(prepared.samples),
        "images": len(prepared.samples),
        "buckets": [{"width": b.width, "height": b.height, "images": n} for b, n in sorted(buckets.items())],
        "warnings": _warnings(config, buckets, prepared),
    }


def meta_model(prepared: Prepared) -> nn.Module:
    """The model without values, with the trunk that exo refers to."""
    module = prepared.architecture.model(prepared.model_config, device="meta")
    if isinstance(module, Exo):
        if module.trunk is None:
            module.attach(build_trunk(prepared.model_config.trunk, device="meta"))
        module.to("meta")  # tables that no file holds have values even so
    return module


def train_stages(module: nn.Module, config: RunConfig) -> None:
    """Lets those parameters change that some stage trains. Raises: ConfigError if patterns match none."""
    trained = {name for s in stages_of(config) for name in trained_names(module, s.config.train.trainable)}
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name in trained)


def memory(module: nn.Module, prepared: Prepared, bucket: Bucket, processes: int) -> dict[str, int]:
    """Bytes of weights, gradients, optimizer, average and activations; the activations are an upper bound.

    Of gradients, optimizer and activations the stage that needs most of each counts. Weights that no stage
    trains are in the precision of the run. What the strategy divides is divided, also where it waits in the
    memory of the CPU; whole blocks that are there for a moment are not counted.
    """
    config = prepared.config
    frozen = DTYPES[config.precision].itemsize
    weights = sum(p.numel() * (4 if p.requires_grad else frozen) for p in module.parameters())
    trained = sum(p.numel() * 4 for p in module.parameters() if p.requires_grad)
    stages = [_stage_memory(module, prepared, stage.config, bucket, processes) for stage in stages_of(config)]
    parts = {
        "weights": weights,
        **{name: max(stage[name] for stage in stages) for name in ("gradients", "optimizer")},
        "ema": trained if config.ema.decay else 0,
        "activations": max(stage["activations"] for stage in stages),
    }
    for name in DIVIDED.get(config.distributed.strategy, ()):
        parts[name] = math.ceil(parts[name] / processes)
    return {**parts, "total": sum(parts.values())}


def _stage_memory(
    module: nn.Module, prepared: Prepared, config: LoopConfig, bucket: Bucket, processes: int
) -> dict[str, int]:
    """Bytes of gradients, optimizer and activations of a stage."""
    names = trained_names(module, config.train.trainable)
    named = {name: module.get_parameter(name) for name in names}
    groups = plan_groups(named.items(), config.optimizer)
    return {
        "gradients": sum(p.numel() * 4 for p in named.values()),
        "optimizer": sum(
            OPTIMIZER_BYTES[g.optimizer] * sum(named[n].numel() for n in g.names) for g in groups
        ),
        "activations": _activations(module, prepared, config, bucket, processes),
    }


def _activations(
    module: nn.Module, prepared: Prepared, config: LoopConfig, bucket: Bucket, processes: int
) -> int:
    """Bytes that one micro-batch saves for the backward pass, counted on the meta device.

    Exo is counted with prompts alone and the most iterations; all that some stage trains takes a gradient.
    """
    model_config = prepared.model_config
    batch = config.train.micro_batch_size or config.train.batch_size // processes
    channels = prepared.architecture.latent_channels(model_config)
    cell = latent_cell(channels)
    height, width = bucket.height // cell, bucket.width // cell
    latents = torch.empty(batch, channels, height, width, device="meta")
    conditioning = _conditioning(prepared, batch, width, height)
    own = {_address(parameter) for parameter in module.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if _address(tensor) not in own:
            kept[_address(tensor)] = tensor
        return tensor

    module.train()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        prepared.architecture.velocity(
            module.forward,
            latents,
            torch.empty(batch, device="meta"),
            conditioning,
            **_options(prepared, config),
            runtime=Runtime(run_block=run_checkpointed)
            if config.train.gradient_checkpointing
            else DEFAULT_RUNTIME,
        )
    scale = 1 if config.precision == "float32" else HALF_SHARE
    return int(sum(tensor.untyped_storage().nbytes() for tensor in kept.values()) * scale)


def _options(prepared: Prepared, config: LoopConfig) -> dict[str, Any]:
    """What a step of training passes to the architecture besides the conditions."""
    if prepared.architecture.name == "exo":
        return {"iterations": config.train.exo.iterations[1]}
    return {"generator": torch.Generator()}


def _conditioning(prepared: Prepared, batch: int, width: int, height: int) -> Conditioning:
    """Conditions of the shapes that training has, without values; width and height in latents."""
    text = prepared.architecture.text_shape(prepared.model_config)
    extras = prepared.architecture.size_extras(prepared.model_config, width, height)
    dtype = torch.long if prepared.architecture.name == "exo" else None  # token ids
    shape = (batch, min(TEXT_TOKENS, text.length), text.width or 0)
    return Conditioning(
        context=None if text.width is None else torch.empty(shape, dtype=dtype),
        pooled=torch.empty(batch, text.pooled) if text.pooled is not None and text.needs_pooled else None,
        extras={name: value.expand(batch, *value.shape[1:]) for name, value in extras.items()},
    ).to("meta")


def _address(tensor: Tensor) -> int:
    """What tensors that share memory have in common, on the meta device, too."""
    return int(tensor.untyped_storage()._cdata)


def _warnings(config: RunConfig, buckets: Counter[Bucket], prepared: Prepared) -> list[str]:
    lines = [
        f"bucket {b.width}x{b.height} holds {n} images, fewer than the batch of {config.train.batch_size}: "
        "a batch will hold some of them twice"
        for b, n in sorted(buckets.items())
        if n < config.train.batch_size
    ]
    fits = [
        crop_and_zoom(sample.width, sample.height, bucket)
        for sample, bucket in zip(prepared.samples, prepared.buckets, strict=True)
    ]
    cropped = sum(crop > MAX_CROP for crop, _ in fits)
    if cropped:
        lines.append(f"{cropped} images lose more than a third of their area; raise buckets.max_aspect")
    enlarged = sum(zoom > MAX_ZOOM for _, zoom in fits)
    if enlarged:
        lines.append(f"{enlarged} images are enlarged more than {MAX_ZOOM} times; lower buckets.resolution")
    if prepared.rejects:
        lines.append(f"{len(prepared.rejects)} files are left out; they will be listed in rejects.csv")
    if config.model.weights is None and config.model.preset != "tiny":
        lines.append("training starts from random weights: model.weights is not given")
    return lines


def describe(plan: dict[str, Any], processes: int = 1) -> str:
    """The plan for a person; its memory is that of each process."""
    memory_parts = plan["memory"]
    share = f" of each of {processes} processes" if processes > 1 else ""
    lines = [
        f"{plan['arch']}: {plan['parameters']:,} parameters, {plan['trainable_parameters']:,} trained",
        f"data: {plan['images']:,} images in {len(plan['buckets'])} buckets, "
        f"{plan['steps']:,} steps = {plan['epochs']:.1f} epochs",
        *(f"  {b['width']}x{b['height']}: {b['images']:,} images" for b in plan["buckets"]),
        f"memory{share}: "
        + ", ".join(f"{name} {size / 2**20:,.0f} MiB" for name, size in memory_parts.items()),
        *(f"warning: {line}" for line in plan["warnings"]),
    ]
    return "\n".join(lines)
