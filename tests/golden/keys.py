"""Key tables: names and shapes that must be exactly those of one layout of one thing the project builds."""

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from flowcore.errors import CheckpointError, FlowCoreError
from flowcore.models import Architecture, detect, find_layout
from flowcore.models.exo.trunk import build_trunk
from flowcore.models.exo.trunk_config import infer_trunk, is_trunk
from flowcore.models.tinyflux.config import PRESETS, is_version_1, read_config
from flowcore.models.tinyflux.lora import LORA_PRESETS, native_shapes
from flowcore.vae.autoencoder import build_autoencoder
from flowcore.vae.config import infer_config
from flowcore.vae.keys import find_prefix, to_diffusers
from flowcore.weights.exo import bare_trunk
from tests.golden.flux_lora import control_lora_fault, is_control_lora

STATISTICS = ("vae_mean", "vae_std")
TINYFLUX_1 = {"axes_dims_rope": (16, 56, 56)}
TINYFLUX_LORA = re.compile(r"(double|single)_blocks_\d+_\w+\.lora_[AB]")


def is_key_table(document: object) -> bool:
    """Whether a JSON document maps names to shapes."""
    return (
        isinstance(document, Mapping)
        and bool(document)
        and all(isinstance(v, list) and all(isinstance(size, int) for size in v) for v in document.values())
    )


def table_fault(table: Mapping[str, Sequence[int]]) -> str:
    """What keeps the table from being that of a model (and its VAE), a VAE or an adapter; or ""."""
    tensors = {name: torch.empty(list(shape), device="meta") for name, shape in table.items()}
    try:
        if all(TINYFLUX_LORA.fullmatch(name) for name in table):
            return _tinyflux_lora_fault(table)
        try:
            architecture, prefix = detect(tensors)
        except CheckpointError:
            if is_trunk(tensors):
                return _trunk_fault(tensors)
            return control_lora_fault(tensors) if is_control_lora(tensors) else _vae_fault(tensors)
        own = {name[len(prefix) :]: t for name, t in tensors.items() if name.startswith(prefix)}
        others = {name: t for name, t in tensors.items() if not name.startswith(prefix)}
        return _model_fault(architecture, own) or (_vae_fault(others) if others else "")
    except (FlowCoreError, RuntimeError, KeyError, StopIteration) as err:
        return f"{type(err).__name__}: {err}"


def _model_fault(architecture: Architecture, state: dict[str, Tensor]) -> str:
    layout = find_layout(architecture, state)
    if layout is not None:
        state = layout.convert(state)
    is_old = architecture.name == "tinyflux" and is_version_1(state)
    # TinyFlux 1 is recognised and never run: its names are a later model's, with heads of another width.
    config = read_config(state, TINYFLUX_1) if is_old else architecture.infer_config(state, None)
    model = architecture.model(config, device="meta")
    buffers = {name for name, _ in model.named_buffers()}
    return _difference(model, state, set() if buffers & set(state) else buffers)


def _tinyflux_lora_fault(table: Mapping[str, Sequence[int]]) -> str:
    """How the table differs from every preset's file for the published model."""
    stated = {name: tuple(shape) for name, shape in table.items()}
    near = {}
    for name, preset in LORA_PRESETS.items():
        built = native_shapes(preset, PRESETS["tinyflux-deep"])
        differing = {key for key in {*built, *stated} if built.get(key) != stated.get(key)}
        if not differing:
            return ""
        near[name] = differing
    name = min(near, key=lambda preset: len(near[preset]))
    return f"{len(near[name])} tensors differ from the preset {name}, first {min(near[name])}"


def _trunk_fault(tensors: dict[str, Tensor]) -> str:
    """How a Qwen3-VL's names differ from the network that Exo builds, and from its output layer."""
    state = bare_trunk(tensors)
    embedding = state["language_model.embed_tokens.weight"]
    others = {name: tuple(tensors[name].shape) for name in tensors if name.startswith("lm_head.")}
    if others not in ({}, {"lm_head.weight": tuple(embedding.shape)}):
        return f"the output layer is {others}"
    return _difference(build_trunk(infer_trunk(state), device="meta"), state, set())


def _vae_fault(tensors: dict[str, Tensor]) -> str:
    prefix = find_prefix(tensors, source="table")
    state = to_diffusers(
        {
            name[len(prefix) :]: t
            for name, t in tensors.items()
            if name.startswith(prefix) and name not in STATISTICS
        }
    )
    others = [name for name in tensors if not name.startswith(prefix) and name not in STATISTICS]
    if others:
        return f"{len(others)} names belong to nothing, first {others[0]}"
    module = build_autoencoder(infer_config(state, source="table"), device="meta")
    channels = module.config["latent_channels"]
    for name in STATISTICS:
        if name in tensors and tuple(tensors[name].shape) != (1, channels, 1, 1):
            return f"{name} has shape {tuple(tensors[name].shape)}"
    return _difference(module, state, set())


def _difference(module: nn.Module, state: Mapping[str, Tensor], optional: set[str]) -> str:
    """How the names and shapes differ from the module's; names that a layout leaves out are optional."""
    built = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    listed = {name: tuple(tensor.shape) for name, tensor in state.items()}
    missing = [name for name in built if name not in listed and name not in optional]
    unknown = [name for name in listed if name not in built]
    shapes = [name for name in built if name in listed and built[name] != listed[name]]
    parts = (("missing", missing), ("unknown", unknown), ("of another shape", shapes))
    return "; ".join(f"{len(names)} {what}, first {names[0]}" for what, names in parts if names)
