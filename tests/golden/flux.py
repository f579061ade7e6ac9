"""Golden cases of Flux: whole models, the two layouts of one model, and LoRA files on top of one."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from flowcore.models import find_architecture
from flowcore.models.flux.layouts import from_diffusers, to_diffusers
from flowcore.weights.checkpoint import LoadedModel
from flowcore.weights.lora import merge, merged_tensors, parse_lora, restore
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
    load_weights,
    part,
    stored_config,
)

NOT_CONFIG = ("strength", "rank", "alpha")  # what the configuration of a LoRA file holds besides the model's
CONTROL = "lora_bfl_control."
NOT_WHOLE = "only whole forwards have a limit in this dtype"


def cases(tensors: Tensors, metadata: Metadata, options: Options) -> Iterator[Outcome]:
    """Every output of one file."""
    kinds = {"model": model_cases, "layout_mapping": layout_cases, "lora_conventions": lora_cases}
    yield from kinds[metadata["kind"]](tensors, metadata, options)


def load(weights: Tensors, metadata: Metadata, options: Options) -> LoadedModel:
    """The model of weights, on the path of users' files; only what shapes do not tell is stated."""
    config = model_config(metadata)
    stated = {name: config[name] for name in ("axes_dim", "theta", "mlp_ratio", "qkv_bias")}
    return load_weights(weights, stated, options)


def model_config(metadata: Metadata) -> dict[str, object]:
    """The configuration of the model of a file."""
    return {name: value for name, value in stored_config(metadata).items() if name not in NOT_CONFIG}


def timed_forward(tensors: Tensors, metadata: Metadata, options: Options) -> Callable[[], Tensor] | None:
    """One forward of a whole model, for the command to time."""
    if metadata["kind"] != "model":
        return None
    model = load(part(tensors, "weight."), metadata, options).model
    forward = torch.compile(model.forward) if options.compile else model.forward
    inputs = model_inputs(tensors, options)
    return lambda: forward(**inputs)


def model_inputs(tensors: Tensors, options: Options) -> dict[str, Tensor]:
    """The arguments of the forward; tokens and y in the dtype of the model, the rest as it is."""
    given = part(tensors, "input.")
    names = ("img", "img_ids", "txt", "txt_ids", "timesteps", "y", "guidance")
    inputs = {name: given[name].to(options.device) for name in names if name in given}
    return {
        name: options.cast(value) if name in ("img", "txt", "y") else value for name, value in inputs.items()
    }


def check_config(loaded: LoadedModel, metadata: Metadata) -> Checked:
    """Whether the configuration read from the tensors is the one the file states."""
    expected = loaded.architecture.config_from_dict(model_config(metadata)).to_dict()
    wrong = [
        f"{name} {value} instead of {expected[name]}"
        for name, value in loaded.config.to_dict().items()
        if value != expected[name]
    ]
    return Checked("config", "; ".join(wrong))


def model_cases(tensors: Tensors, metadata: Metadata, options: Options) -> Iterator[Outcome]:
    """Configuration, forward, and the gradients of sum(out * cotangent) by the tokens."""
    loaded = load(part(tensors, "weight."), metadata, options)
    yield check_config(loaded, metadata)
    inputs = model_inputs(tensors, options)
    leaves = {name: inputs[name].requires_grad_() for name in ("img", "txt")}
    forward = torch.compile(loaded.model.forward) if options.compile else loaded.model.forward
    result = forward(**inputs)
    yield Case("output.out", result.float(), tensors["output.out"], WHOLE_MODEL_LIMITS[options.dtype])
    gradients = {
        f"output.grad_{name}": leaf for name, leaf in leaves.items() if f"output.grad_{name}" in tensors
    }
    if options.dtype != torch.float32:
        yield from (Skipped(name, NOT_WHOLE) for name in gradients)
    elif gradients:
        (result * tensors["input.cotangent"].to(options.device)).sum().backward()
        for name, leaf in gradients.items():
            assert leaf.grad is not None
            yield Case(name, leaf.grad, tensors[name], CHAIN_LIMIT)


def layout_cases(tensors: Tensors, metadata: Metadata, options: Options) -> Iterator[Outcome]:
    """One model in two layouts: each is read, and each is made of the other exactly."""
    original, foreign = part(tensors, "weight."), part(tensors, "weight_diffusers.")
    limit = WHOLE_MODEL_LIMITS[options.dtype]
    for weights, name in ((original, "out"), (foreign, "out_diffusers")):
        loaded = load(weights, metadata, options)
        yield check_config(loaded, metadata)
        with torch.no_grad():
            result = loaded.model(**model_inputs(tensors, options))
        yield Case(f"output.{name}", result.float(), tensors[f"output.{name}"], limit)
    config = find_architecture("flux").config_from_dict(model_config(metadata))
    yield same_tensors("diffusers to original", from_diffusers(foreign), original)
    yield same_tensors("original to diffusers", to_diffusers(original, config), foreign)


def same_tensors(what: str, actual: Tensors, expected: Tensors) -> Checked:
    """Whether names and values are equal."""
    different = sorted(
        name
        for name in {*actual, *expected}
        if name not in actual or name not in expected or not torch.equal(actual[name], expected[name])
    )
    return Checked(what, f"{len(different)} tensors differ, first {different[0]}" if different else "")


def lora_cases(tensors: Tensors, metadata: Metadata, options: Options) -> Iterator[Outcome]:
    """The base model, and what every LoRA in the file makes of it; after it is taken off, the base again."""
    settings = stored_config(metadata)
    weights = part(tensors, "weight.")
    limit = WHOLE_MODEL_LIMITS[options.dtype]
    inputs = model_inputs(tensors, options)
    model = load(weights, metadata, options).model
    with torch.no_grad():
        base = model(**inputs)
        yield Case("output.base", base.float(), tensors["output.base"], limit)
        if options.dtype != torch.float32:
            names = sorted(name for name in tensors if name in ("output.merged", "output.control"))
            yield from (Skipped(name, NOT_WHOLE) for name in names)
            return
        for prefix in sorted(
            {f"{name.split('.')[0]}." for name in tensors if name.startswith("lora_")} - {CONTROL}
        ):
            lora = parse_lora(
                part(tensors, prefix), {}, model.state_dict(), find_architecture("flux"), source=prefix
            )
            yield Checked(f"{prefix}keys", f"unused: {', '.join(lora.unused)}" if lora.unused else "")
            originals = merge(model, lora, settings["strength"])
            result = model(**inputs)
            yield Case("output.merged", result.float(), tensors["output.merged"], limit)
            restore(model, originals)
            yield Checked(
                f"{prefix}unmerged", "" if torch.equal(model(**inputs), base) else "not the base again"
            )
        if "output.control" in tensors:
            yield from control_cases(tensors, metadata, options)


def control_cases(tensors: Tensors, metadata: Metadata, options: Options) -> Iterator[Outcome]:
    """A control LoRA: the input layer widens, so a model is built of what the LoRA makes of the weights."""
    weights = part(tensors, "weight.")
    lora = parse_lora(part(tensors, CONTROL), {}, weights, find_architecture("flux"), source=CONTROL)
    yield Checked(f"{CONTROL}keys", f"unused: {', '.join(lora.unused)}" if lora.unused else "")
    model = load({**weights, **merged_tensors(weights, lora)}, metadata, options).model
    inputs = model_inputs(tensors, options)
    control = tensors["input.control"].to(inputs["img"])
    result = model(**{**inputs, "img": torch.cat((inputs["img"], control), dim=-1)})
    yield Case("output.control", result.float(), tensors["output.control"], WHOLE_MODEL_LIMITS[options.dtype])
