"""Golden cases of Exo: trunk passes, schedules, and the parts of the original that run."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from flowcore.flow import ddim, euler, flux2_mu, shift_sigma, sigma_grid
from flowcore.models.exo.reference import (
    ConvolutionalProjector,
    LatentCrossAttention,
    PooledDiffusionHead,
    PooledEditHead,
    source_loss,
)
from flowcore.models.exo.trunk import (
    Pass,
    at_image,
    causal_mask,
    look,
    prefix_positions,
    run_decoder,
    suffix_mask,
)
from flowcore.models.exo.trunk_config import TrunkConfig, infer_trunk, trunk_config
from flowcore.ops import DEFAULT_RUNTIME
from flowcore.vae.autoencoder import build_autoencoder
from flowcore.vae.keys import to_diffusers
from flowcore.weights.exo import trunk_from_tensors
from flowcore.weights.strict import assign_strict
from tests.golden.compare import (
    CHAIN_LIMIT,
    Case,
    Checked,
    Metadata,
    Options,
    Outcome,
    Tensors,
    part,
    stored_config,
)


def cases(tensors: Tensors, metadata: Metadata, options: Options) -> Iterator[Outcome]:
    """Every output of one file, in float32 under every dtype: none is a whole Exo."""
    kinds = {
        "trunk_suffix": trunk_cases,
        "flux2_latents": latent_cases,
        "schedule": schedule_cases,
        "source_heads": head_cases,
        "source_projector": projector_cases,
    }
    yield from kinds[metadata["kind"]](tensors, metadata, options)


def trunk_cases(tensors: Tensors, metadata: Metadata, options: Options) -> Iterator[Outcome]:
    """The prompt once, then suffixes on its keys and values; the file has those of one pass without cache."""
    settings = stored_config(metadata)
    weights = part(tensors, "weight.")
    config = trunk_config(settings["model"], source="config")
    trunk = trunk_from_tensors(config, weights, source="weights", device=options.device)
    yield check_sizes(config, infer_trunk(weights, config))
    inputs = {name: tensor.to(options.device) for name, tensor in part(tensors, "input.").items()}
    with torch.no_grad():
        yield from passes(trunk, inputs, tensors, settings)


def check_sizes(stated: TrunkConfig, inferred: TrunkConfig) -> Checked:
    """Whether the sizes read from the tensors are those stated."""
    wrong = [
        f"{name} {value} instead of {stated[where].get(name)}"
        for where in ("text_config", "vision_config")
        for name, value in inferred[where].items()
        if stated[where].get(name, value) != value
    ]
    return Checked("config", "; ".join(wrong))


def passes(
    trunk: nn.Module, inputs: Tensors, tensors: Tensors, settings: Mapping[str, Any]
) -> Iterator[Outcome]:
    """What the prefix and each suffix yield."""
    ids, mask, layers = inputs["input_ids"], inputs["attention_mask"].bool(), settings["context_layers"]
    is_image = (ids == trunk.config.image_token_id) & mask
    grid = inputs["image_grid_thw"]
    picture = look(trunk, inputs["pixel_values"].unflatten(0, (len(grid), -1)), grid)
    yield case("visual_tokens", picture.tokens.flatten(0, 1), tensors)
    positions = prefix_positions(is_image, mask, (picture.rows, picture.columns))
    yield case("prefix_position_ids", positions, tensors)
    x = at_image(trunk.language_model.embed_tokens(ids), is_image, picture.tokens)
    deep = [at_image(torch.zeros_like(x), is_image, features) for features in picture.deep]

    def add_deep(layer: int, h: Tensor) -> Tensor:
        return h + deep[layer] if layer < len(deep) else h

    fixed = {"taps": layers, "lora": None, "runtime": DEFAULT_RUNTIME}
    passed = run_decoder(trunk, x, positions, keep=causal_mask(mask), past=None, after=add_deep, **fixed)
    yield from taps(passed, "prefix", layers, tensors)
    for layer, kept in enumerate(passed.past.layers):
        yield case(f"prefix_key.{layer}", kept.keys, tensors)
        yield case(f"prefix_value.{layer}", kept.values, tensors)
    first = positions.amax(dim=(0, 2)) + 1
    yield case("suffix_first_position", first, tensors)
    for iteration in range(settings["iterations"]):
        suffix = inputs[f"suffix.{iteration}"]
        length = suffix.shape[1]
        places = first[:, None] + iteration * length + torch.arange(length, device=ids.device)
        passed = run_decoder(
            trunk,
            suffix,
            places.expand(3, -1, -1),
            keep=suffix_mask(mask, length, iteration),
            past=passed.past,
            after=lambda _, h: h,
            **fixed,
        )
        yield case(f"hidden.{iteration}", passed.hidden, tensors)
        yield from taps(passed, f"suffix.{iteration}", layers, tensors)


def taps(passed: Pass, name: str, layers: list[int], tensors: Tensors) -> Iterator[Outcome]:
    """What entered the layers."""
    for layer, tap in zip(layers, passed.taps, strict=True):
        yield case(f"layer_input.{layer}.{name}", tap, tensors)


def case(name: str, actual: Tensor, tensors: Tensors) -> Case:
    """The comparison of an output; the file has zeros where a prompt is padded."""
    expected, mask = tensors[f"output.{name}"], tensors["input.attention_mask"].bool()
    if name.endswith(".prefix") or name.startswith(("prefix_key", "prefix_value")):
        real = mask[:, :, None] if expected.ndim == 3 else mask[:, None, :, None]
        actual = torch.where(real, actual.cpu(), 0)
    return Case(f"output.{name}", actual, expected)


def latent_cases(tensors: Tensors, metadata: Metadata, options: Options) -> Iterator[Outcome]:
    """FLUX.2's latents: the posterior's mean as the encoder gives it, packed and normalised, and back."""
    settings = stored_config(metadata)
    config = {**settings["autoencoder"], "batch_norm_eps": settings["batch_norm_eps"]}
    module = build_autoencoder(config, device="meta").eval()
    assign_strict(module, to_diffusers(part(tensors, "weight.")), source="weights", what="FLUX.2 autoencoder")
    module.to(options.device)
    raw: list[Tensor] = []
    module.quant_conv.register_forward_hook(lambda _layer, _inputs, output: raw.append(output))
    with torch.no_grad():
        latent = module.encode(tensors["input.image"].to(options.device)).latent_dist.mode()
        image = module.decode(latent).sample
    yield Case("output.vae_mean", raw[0].chunk(2, dim=1)[0], tensors["output.vae_mean"])
    yield Case("output.latent", latent, tensors["output.latent"])
    yield Case("output.image", image, tensors["output.image"])


def schedule_cases(tensors: Tensors, metadata: Metadata, _options: Options) -> Iterator[Outcome]:
    """Grids, the path under a linear velocity, and the noise that DDIM adds with eta 1."""
    settings = stored_config(metadata)
    sigmas = sigma_grid(settings["steps"], settings["shift"])
    yield Case("output.sigmas", sigmas.float(), tensors["output.sigmas"])
    for tokens, steps in settings["flux2_cases"]:
        mu, where = flux2_mu(tokens, steps), f"{tokens}.{steps}"
        grid = shift_sigma(sigma_grid(steps), math.exp(mu))
        for name, value in (("mu", torch.tensor([mu])), ("sigmas", grid.float())):
            yield Case(f"output.flux2_{name}.{where}", value, tensors[f"output.flux2_{name}.{where}"])
    matrix, slope = (tensors[f"input.{name}"].double() for name in ("A", "b"))

    def velocity(z: Tensor, t: Tensor) -> Tensor:
        return z @ matrix.T + slope * t.double()[:, None]

    start = tensors["input.z_start"].double()
    for solver in (euler, ddim):
        ends = [solver(velocity, start, sigmas[: count + 1]) for count in range(1, len(sigmas))]
        path = torch.stack([start, *ends])
        yield Case("output.path", path.float(), tensors["output.path"], CHAIN_LIMIT)
    zero = torch.zeros(1, 1, dtype=torch.float64)
    added = [
        ddim(
            lambda z, _: torch.zeros_like(z),
            zero,
            sigmas[step : step + 2],
            noise=lambda _, like: torch.ones_like(like),
            eta=1.0,
        )
        for step in range(settings["steps"])
    ]
    yield Case("output.ddim_tau_eta1", torch.cat(added)[:, 0].float(), tensors["output.ddim_tau_eta1"])


def head_cases(tensors: Tensors, metadata: Metadata, _options: Options) -> Iterator[Outcome]:
    """The pooled heads, the cross-attention, the loss."""
    settings = stored_config(metadata)
    dim, channels, size = (settings[name] for name in ("hidden_dim", "latent_dim", "latent_size"))
    modules = {
        "diffusion_head.": PooledDiffusionHead(dim, channels, size),
        "edit_head.": PooledEditHead(dim, settings["delta_dim"], settings["mask_size"]),
        "cross_attn_layers.0.": LatentCrossAttention(dim, channels, settings["num_heads"]),
    }
    for prefix, module in modules.items():
        module.load_state_dict(part(tensors, f"weight.{prefix}"), strict=True)
    diffusion, edit, cross = modules.values()
    hidden, latents = tensors["input.hidden_states"], tensors["input.latents"]
    with torch.no_grad():
        eps = diffusion(hidden)
        mask, delta = edit(hidden, settings["num_selected"])
        loss = source_loss(
            eps.movedim(-1, 1), tensors["input.target_vel"], mask, settings["loss_weights"][:2]
        )
        values = {
            "eps_pred": eps,
            "edit_mask": mask,
            "edit_delta": delta,
            "edit_delta_all_cells": edit(hidden)[1],
            "cross_attention": cross(hidden, latents),
            "loss_diffusion": loss.diffusion[None],
            "loss_mask_l1": loss.mask[None],
            "loss_total_without_perceptual": loss.total[None],
        }
    for name, value in values.items():
        limit = CHAIN_LIMIT if name.startswith("loss") else None
        yield Case(f"output.{name}", value, tensors[f"output.{name}"], limit)


def projector_cases(tensors: Tensors, metadata: Metadata, _options: Options) -> Iterator[Outcome]:
    """The convolutional projector, with weights by the file's formula."""
    settings = stored_config(metadata)
    module = ConvolutionalProjector(settings["vision_dim"], settings["latent_dim"], settings["latent_size"])
    rule, state = settings["weight_formula"], {}
    shapes = {name: tensor.shape for name, tensor in module.state_dict().items()}
    for number, name in enumerate(settings["state_dict_order"]):
        steps = torch.arange(shapes[name].numel(), dtype=torch.float64)
        values = rule["amplitude"] * torch.sin(rule["omega"] * steps + rule["phase"] * number)
        is_scale = name in ("norm1.weight", "norm2.weight")
        state[name] = (values + is_scale).float().reshape(shapes[name])
    module.load_state_dict(state, strict=True)
    with torch.no_grad():
        yield Case("output.latents", module(tensors["input.vision_tokens"]), tensors["output.latents"])
