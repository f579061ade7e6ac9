"""The layouts that files of the architectures come in, as small random files."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from flowcore.models import find_architecture
from flowcore.models.flux.layouts import to_diffusers
from flowcore.models.tinyflux.layouts import current_to_version_3
from flowcore.weights.checkpoint import load_model

Tensors = dict[str, Tensor]
ARCHS = ("xut", "flux", "tinyflux", "single_stream")
FLUX = find_architecture("flux").presets["points"]
FLUX_128 = replace(FLUX, hidden_size=128, num_heads=1, axes_dim=(16, 56, 56), theta=10_000)
TINYFLUX = replace(find_architecture("tinyflux").presets["tiny"], sol_qk_scale=True)
XUT = find_architecture("xut").presets["tiny"]
STREAM = find_architecture("single_stream").presets["tiny"]
STREAM_HEAD = replace(STREAM, variant="head", fourier_stack_depth=1)


def state_of(arch: str, config: object) -> Tensors:
    """Random weights under the original names."""
    torch.manual_seed(0)
    state: Tensors = find_architecture(arch).model(config).state_dict()
    return state


def prefixed(prefix: str) -> Callable[[Tensors], Tensors]:
    return lambda state: {prefix + name: tensor for name, tensor in state.items()}


def all_in_one(prefix: str) -> Callable[[Tensors], Tensors]:
    """The model as part of a checkpoint with autoencoder and text encoder."""
    others = {"vae.encoder.conv_in.weight": torch.zeros(1), "text_encoders.clip_l.a.weight": torch.zeros(1)}
    return lambda state: {**prefixed(prefix)(state), **others}


def scaled_fp8(state: Tensors) -> Tensors:
    """Matrices of whole numbers with a scale of 1/4 each; what is no matrix stays."""
    result = {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}
    for name, tensor in state.items():
        if tensor.ndim == 2:
            result[name] = (tensor * 4).to(torch.float8_e4m3fn)
            result[f"{name.removesuffix('weight')}scale_weight"] = torch.tensor(0.25)
        else:
            result[name] = tensor
    return result


def after_scaling(state: Tensors) -> Tensors:
    """The weights that a file of `scaled_fp8` stands for."""
    return {
        name: ((t * 4).to(torch.float8_e4m3fn).float() / 4).to(torch.bfloat16) if t.ndim == 2 else t
        for name, t in state.items()
    }


def without(*parts: str) -> Callable[[Tensors], Tensors]:
    return lambda state: {k: t for k, t in state.items() if not any(part in k for part in parts)}


def as_is(state: Tensors) -> Tensors:
    return state


NO_EXPERTS = replace(TINYFLUX, use_sol_prior=False, use_t5_vec=False)


@dataclass(frozen=True)
class Case:
    """A layout: what a file of it holds, and what is said of it."""

    arch: str
    config: Any
    write: Callable[[Tensors], Tensors] = as_is
    layout: str = "bare"
    prefix: str = ""
    version: str | None = None
    others: int = 0
    expected: Callable[[Tensors], Tensors] = as_is
    is_configured: bool = True
    """Whether the file states its configuration, as the project's own do."""


def of_stream(config: object, version: str, prefix: str = "") -> Case:
    return Case("single_stream", config, prefixed(prefix), prefix=prefix, version=version)


def of_tinyflux(
    write: Callable[[Tensors], Tensors], version: str, config: object = TINYFLUX, **more: Any
) -> Case:
    return Case("tinyflux", config, write, version=version, **more)


UI = "model.diffusion_model."
CASES: dict[str, Case] = {
    "xut": Case("xut", XUT),
    "xut single file": Case("xut", XUT, all_in_one("unet.model."), prefix="unet.model.", others=2),
    "xut diffusers": Case("xut", XUT, prefixed("model."), prefix="model."),
    "xut ComfyUI": Case("xut", XUT, prefixed(UI), prefix=UI),
    "xut ComfyUI bare": Case("xut", XUT, prefixed("diffusion_model."), prefix="diffusion_model."),
    "xut transformer": Case("xut", XUT, prefixed("transformer."), prefix="transformer."),
    "flux BFL": Case("flux", FLUX_128, is_configured=False),
    "flux project": Case("flux", FLUX),
    "flux ComfyUI": Case("flux", FLUX_128, all_in_one(UI), prefix=UI, others=2, is_configured=False),
    **{
        f"flux {prefix}": Case("flux", FLUX_128, prefixed(prefix), prefix=prefix, is_configured=False)
        for prefix in ("module.", "_orig_mod.", "transformer.", "model.", "diffusion_model.")
    },
    "flux diffusers": Case(
        "flux", FLUX_128, lambda s: to_diffusers(s, FLUX_128), layout="diffusers", is_configured=False
    ),
    "flux diffusers transformer": Case(
        "flux",
        FLUX_128,
        lambda s: prefixed("transformer.")(to_diffusers(s, FLUX_128)),
        layout="diffusers",
        prefix="transformer.",
        is_configured=False,
    ),
    "flux scaled": Case(
        "flux", FLUX_128, scaled_fp8, layout="scaled_fp8", expected=after_scaling, is_configured=False
    ),
    "flux scaled ComfyUI": Case(
        "flux",
        FLUX_128,
        lambda s: prefixed(UI)(scaled_fp8(s)),
        layout="scaled_fp8",
        prefix=UI,
        expected=after_scaling,
        is_configured=False,
    ),
    "tinyflux 4.2": of_tinyflux(as_is, "4.1 or 4.2"),
    "tinyflux 4.2 compiled": of_tinyflux(prefixed("_orig_mod."), "4.1 or 4.2", prefix="_orig_mod."),
    "tinyflux 4.2 first": of_tinyflux(
        without("spatial_to_qk_scale"), "4.2 (first)", replace(TINYFLUX, sol_qk_scale=False)
    ),
    "tinyflux 4.1 without Sol": of_tinyflux(
        lambda s: {
            **s,
            **{
                f"{kind}_blocks.0.attn.spatial_to_mod.{part}": torch.zeros(NO_EXPERTS.num_attention_heads)
                for kind in ("double", "single")
                for part in ("weight", "bias")
            },
        },
        "3 or later",
        NO_EXPERTS,
        layout="v4.1",
    ),
    "tinyflux 3": of_tinyflux(lambda s: current_to_version_3(s, NO_EXPERTS), "3", NO_EXPERTS, layout="v3"),
    "tinyflux 2": of_tinyflux(
        lambda s: {**without("rope.freqs")(s), "time_in.sin_basis": torch.zeros(128)},
        "2",
        replace(NO_EXPERTS, use_lune_expert=False),
        layout="v4.1",
    ),
    "single_stream v3": of_stream(STREAM, "v3"),
    "single_stream head": of_stream(STREAM_HEAD, "head"),
    **{
        f"single_stream {prefix}": of_stream(STREAM, "v3", prefix)
        for prefix in ("_orig_mod.", "module.", "module._orig_mod.", "_orig_mod.module.", UI)
    },
}


def write(case: Case, path: Path) -> Tensors:
    """Write a file of the layout; return the weights that a model of it has."""
    state = state_of(case.arch, case.config)
    metadata = {"flowcore.config": json.dumps(case.config.to_dict())} if case.is_configured else {}
    tensors = {name: tensor.clone() for name, tensor in case.write(state).items()}
    if path.suffix == ".safetensors":
        save_file(tensors, path, metadata=metadata)
    else:
        torch.save(tensors, path)
    return case.expected(state)


def assert_loads(path: Path, case: Case, expected: Tensors) -> None:
    loaded = load_model(path)
    assert loaded.architecture.name == case.arch
    found = loaded.model.state_dict()
    for name, tensor in expected.items():
        if name in found:
            assert torch.equal(found[name], tensor), name
    assert found.keys() >= {k for k in expected if ".spatial_to_" not in k}
