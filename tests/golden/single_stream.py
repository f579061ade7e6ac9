"""Golden cases of SingleStreamDiT: whole models and filters; training and samplers are in the file beside."""

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from flowcore.layers.embeddings import sinusoidal
from flowcore.models.single_stream import SingleStreamConfig, SingleStreamDiT
from flowcore.models.single_stream.fourier import ChannelMixer, SpectralGain
from flowcore.models.single_stream.positions import grid_angles
from flowcore.ops import TORCH_OPS
from flowcore.weights.checkpoint import LoadedModel
from tests.golden import single_stream_training
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

document_cases = single_stream_training.document_cases
NOT_WHOLE = "only whole forwards have a limit in this dtype"


def cases(tensors: Tensors, metadata: Metadata, options: Options) -> Iterator[Outcome]:
    """Every output of one file."""
    kinds = {
        "model": model_cases,
        "fourier_filter": filter_cases,
        "losses": single_stream_training.loss_cases,
        "samplers": single_stream_training.sampler_cases,
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
    """The arguments of the forward."""
    inputs = {name: tensors[f"input.{name}"].to(options.device) for name in ("x", "t", "text_embeds")}
    return {name: value if name == "t" else options.cast(value) for name, value in inputs.items()}


def model_cases(tensors: Tensors, metadata: Metadata, options: Options) -> Iterator[Outcome]:
    """Configuration, forward, tables, what passes between the stages, loss and gradients."""
    loaded = load(tensors, metadata, options)
    model = loaded.model
    assert isinstance(model, SingleStreamDiT)
    yield check_config(loaded, metadata)
    outputs = part(tensors, "output.")
    forward = torch.compile(model.forward) if options.compile else model.forward
    with torch.no_grad():
        result = forward(**model_inputs(tensors, options))
    yield Case("output.v", result.float(), outputs["v"], WHOLE_MODEL_LIMITS[options.dtype])
    details = sorted(set(outputs) - {"v"})
    if options.dtype != torch.float32:
        yield from (Skipped(f"output.{name}", NOT_WHOLE) for name in details)
        return
    computed = table_values(model, tensors, options) | inner_values(model, tensors, options)
    if "mse" in outputs:
        computed |= train_values(model, tensors, options)
    for name in details:
        if name in computed:
            is_chain = name == "mse" or name.startswith("grad.")
            yield Case(f"output.{name}", computed[name], outputs[name], CHAIN_LIMIT if is_chain else None)


def check_config(loaded: LoadedModel, metadata: Metadata) -> Checked:
    """Whether the configuration read from the tensors is the one the file states."""
    found, stated = loaded.config.to_dict(), stored_config(metadata)
    wrong = [
        f"{name} {found[name]} instead of {value}" for name, value in stated.items() if found[name] != value
    ]
    return Checked("config", "; ".join(wrong))


def table_values(model: SingleStreamDiT, tensors: Tensors, options: Options) -> dict[str, Tensor]:
    """Rotary tables and time features."""
    config = model.config
    rows, columns = (side // config.patch_size for side in tensors["input.x"].shape[-2:])
    angles = grid_angles(rows, columns, config.head_dim, config.rope_base, torch.device(options.device))
    features = sinusoidal(tensors["input.t"].to(options.device), model.t_embedder[0].in_features)
    return {"rope_cos": angles.cos(), "rope_sin": angles.sin(), "t_freq": features}


def inner_values(model: SingleStreamDiT, tensors: Tensors, options: Options) -> dict[str, Tensor]:
    """Outputs of the modules that the file names, and what enters the context refiners, seen by hooks."""
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: object, output: Tensor) -> None:
            seen[f"inter.{name}"] = output

        return hook

    def keep_input(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen["inter.context_in"] = inputs[0]

    modules = dict(model.named_modules())
    handles = [
        modules[name].register_forward_hook(keep(name))
        for name in part(tensors, "output.inter.")
        if name in modules
    ]
    handles.append(model.context_refiner[0].register_forward_pre_hook(keep_input))
    with torch.no_grad():
        model(**model_inputs(tensors, options))
    for handle in handles:
        handle.remove()
    return seen


def train_values(model: SingleStreamDiT, tensors: Tensors, options: Options) -> dict[str, Tensor]:
    """Loss and gradients."""
    target = tensors["input.target"].to(options.device)
    loss = functional.mse_loss(model(**model_inputs(tensors, options)), target)
    loss.backward()
    values = {"mse": loss.detach()}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            values[f"grad.{name}"] = parameter.grad
    return values


FILTERS: Mapping[str, type[ChannelMixer] | type[SpectralGain]] = {"v3": ChannelMixer, "head": SpectralGain}


def filter_cases(tensors: Tensors, metadata: Metadata, options: Options) -> Iterator[Case]:
    """One filter on several grids, in float32 under every dtype, its inputs rounded to none."""
    settings = stored_config(metadata)
    variant = settings["variant"]
    config = SingleStreamConfig(variant=variant, hidden_size=settings["dim"], num_heads=1)
    module = FILTERS[variant](config, ops=TORCH_OPS, device=options.device)
    module.load_state_dict(part(tensors, "weight."), strict=True)
    for name, x in part(tensors, "input.x_").items():
        rows, columns = (int(size) for size in name.split("x"))
        with torch.no_grad():
            result = module(x.to(options.device), rows, columns)
        yield Case(f"output.y_{name}", result, tensors[f"output.y_{name}"])
