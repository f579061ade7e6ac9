"""Golden cases of XUT: whole models and the JAX port; modules and metrics are in the files beside."""

import json
from collections.abc import Callable, Iterator
from unittest import mock

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional

from flowcore.conditioning import Conditioning
from flowcore.flow import guided, interpolate, sigma_grid
from flowcore.flow.solvers import euler
from flowcore.models.xut import XUDiT, velocity
from flowcore.models.xut.velocity import EXTRAS
from flowcore.weights.checkpoint import LoadedModel
from tests.golden import xut_metrics, xut_modules
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

CHOICE = "flowcore.models.xut.model.choose_tokens"
document_cases = xut_metrics.document_cases
NOT_WHOLE = "only whole forwards have a limit in this dtype"


def cases(tensors: Tensors, metadata: Metadata, options: Options) -> Iterator[Outcome]:
    """Every output of one file."""
    kinds = {
        "model": model_cases,
        "model_port": port_cases,
        "modules": xut_modules.cases,
        "backbone": xut_modules.backbone_cases,
        "embedding_metrics": xut_metrics.embedding_cases,
    }
    yield from kinds[metadata["kind"]](tensors, metadata, options)


def timed_forward(tensors: Tensors, metadata: Metadata, options: Options) -> Callable[[], Tensor] | None:
    """One forward of a whole model, for the command to time."""
    if metadata["kind"] != "model":
        return None
    model = load(tensors, metadata, options).model
    forward = torch.compile(model.forward) if options.compile else model.forward
    inputs = model_inputs(tensors, options)
    return lambda: forward(**inputs)


def model_inputs(tensors: Tensors, options: Options) -> dict[str, Tensor]:
    """The arguments of the plain forward."""
    given = part(tensors, "input.")
    names = ("x", "t", "ctx", "ctx_mask", "pos_map", "r", "addon_info")
    inputs = {name: given[name].to(options.device) for name in names if name in given}
    if "class_ids" in given:
        inputs["ctx"] = given["class_ids"].to(options.device)
    for name in ("x", "ctx"):
        if name in inputs and inputs[name].is_floating_point():
            inputs[name] = options.cast(inputs[name])
    return inputs


def model_cases(tensors: Tensors, metadata: Metadata, options: Options) -> Iterator[Outcome]:
    """Configuration, forwards, intermediate results, loss and gradients, guided samples."""
    loaded = load(tensors, metadata, options)
    model = loaded.model
    assert isinstance(model, XUDiT)
    yield check_config(loaded, metadata)
    outputs = part(tensors, "output.")
    limit = WHOLE_MODEL_LIMITS[options.dtype]
    for name in sorted(outputs):
        if name in ("velocity", "velocity_no_tread"):
            forward = torch.compile(model.forward) if options.compile else model.forward
            is_routed = name == "velocity" and "input.tread_keep_mask" in tensors
            with torch.no_grad():
                result = run_forward(forward, tensors, options, is_routed)
            yield Case(f"output.{name}", result.float(), outputs[name], limit)
    yield from detail_cases(model, tensors, metadata, options)


def detail_cases(
    model: XUDiT, tensors: Tensors, metadata: Metadata, options: Options
) -> Iterator[Case | Skipped]:
    """The outputs besides the forwards."""
    outputs = part(tensors, "output.")
    details = {name for name in outputs if name.split(".")[0] in ("debug", "train", "sample")}
    if options.dtype != torch.float32:
        yield from (Skipped(f"output.{name}", NOT_WHOLE) for name in sorted(details))
        return
    computed: dict[str, Tensor] = {}
    if any(name.startswith("debug.") for name in details):
        computed |= debug_values(model, tensors, options)
    if any(name.startswith("train.") for name in details):
        computed |= train_values(model, tensors, options)
    if "sample.latent" in details:
        computed["sample.latent"] = sample_latents(model, tensors, metadata, options)
    for name in sorted(details & set(computed)):
        is_chain = not name.startswith("debug.")
        yield Case(f"output.{name}", computed[name], outputs[name], CHAIN_LIMIT if is_chain else None)


def check_config(loaded: LoadedModel, metadata: Metadata) -> Checked:
    """Whether the configuration read from the tensors is the one the file states."""
    expected = loaded.architecture.config_from_dict(stored_config(metadata))
    pairs = ((name, expected.to_dict()[name], value) for name, value in loaded.config.to_dict().items())
    names = ("enc_blocks", "dec_blocks")  # one number and a list of equal numbers mean the same
    wrong = [
        f"{name} {got} instead of {want}" for name, want, got in pairs if want != got and name not in names
    ]
    for counts in ("enc_block_counts", "dec_block_counts"):
        if getattr(loaded.config, counts) != getattr(expected, counts):
            wrong.append(f"{counts} {getattr(loaded.config, counts)} instead of {getattr(expected, counts)}")
    return Checked("config", "; ".join(wrong))


def run_forward(
    forward: Callable[..., Tensor], tensors: Tensors, options: Options, is_routed: bool
) -> Tensor:
    """The forward, where asked with the file's choice of tokens in the place of a random one."""
    inputs = model_inputs(tensors, options)
    if not is_routed:
        return forward(**inputs)
    keep = tensors["input.tread_keep_mask"].to(options.device)
    chosen = rearrange(keep.nonzero()[:, 1], "(b k) -> b k", b=keep.shape[0])
    with mock.patch(CHOICE, return_value=chosen):
        return forward(**inputs, tread_rate=0.5, generator=torch.Generator())


def debug_values(model: XUDiT, tensors: Tensors, options: Options) -> dict[str, Tensor]:
    """What passes between the stages of the forward, seen by hooks."""
    seen: dict[str, Tensor] = {}

    def keep(*names: str) -> Callable[..., None]:
        def hook(_module: object, _inputs: object, output: Tensor | tuple[Tensor, ...]) -> None:
            parts = output if isinstance(output, tuple) else (output,)
            seen.update({f"debug.{name}": value for name, value in zip(names, parts, strict=True)})

        return hook

    handles = [
        model.in_patch.register_forward_hook(keep("patch_tokens")),
        model.time_emb.register_forward_hook(keep("time_emb")),
        model.backbone.register_forward_hook(keep("backbone_out", "enc_out")),
    ]
    inputs = model_inputs(tensors, options)
    with torch.no_grad():
        run_forward(model, tensors, options, is_routed="input.tread_keep_mask" in tensors)
        stream = model.embed(**inputs)
    for handle in handles:
        handle.remove()
    positions = stream.signals.positions
    assert positions is not None
    seen["debug.token_pos"] = positions[:, : stream.num_image].expand(len(inputs["x"]), -1, -1)
    return seen


def train_values(model: XUDiT, tensors: Tensors, options: Options) -> dict[str, Tensor]:
    """The flow-matching loss and its gradients."""
    given = {name: value.to(options.device) for name, value in part(tensors, "input.train.").items()}
    sample = interpolate(given["x0"], given["noise"], given["t"])
    inputs = model_inputs(tensors, options) | {"x": sample.noised, "t": given["t"]}
    loss = functional.mse_loss(model(**inputs), sample.velocity)
    loss.backward()
    values = {"train.loss": loss.detach()[None], "train.x_t": sample.noised}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            values[f"train.grad.{name}"] = parameter.grad
    return values


def sample_latents(model: XUDiT, tensors: Tensors, metadata: Metadata, options: Options) -> Tensor:
    """Euler steps with classifier-free guidance, the branches as separate calls."""
    settings = json.loads(metadata["sample"])
    given = {name: value.to(options.device) for name, value in part(tensors, "input.").items()}

    extras = {name: given[name] for name in EXTRAS if name in given}

    def branch(context: Tensor | None, mask: Tensor | None) -> Callable[[Tensor, Tensor], Tensor]:
        conditioning = Conditioning(context=context, context_mask=mask, extras=extras)
        return lambda x, sigma: velocity(model.forward, x, sigma, conditioning)

    conditional = branch(given["ctx"], given.get("ctx_mask"))
    mixed = guided(conditional, branch(given.get("sample.neg_ctx"), None), settings["cfg"])
    with torch.no_grad():
        return euler(mixed, given["sample.noise"], sigma_grid(settings["steps"]))


def port_cases(tensors: Tensors, metadata: Metadata, options: Options) -> Iterator[Case]:
    """The JAX port: its names and its layout of images, loaded and run as ours."""
    model = load(tensors, metadata, options).model
    inputs = model_inputs(tensors, options)
    inputs["x"] = rearrange(inputs["x"], "b h w c -> b c h w")
    with torch.no_grad():
        result = rearrange(model(**inputs), "b c h w -> b h w c")
    yield Case(
        "output.velocity", result.float(), tensors["output.velocity"], WHOLE_MODEL_LIMITS[options.dtype]
    )
