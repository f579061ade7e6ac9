"""Every layout that files of the architectures come in: recognised, loaded, described, and converted."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from flowcore.__main__ import main
from flowcore.errors import CheckpointError, FlowCoreError
from flowcore.inspection import convert_file, describe_file, layouts_of
from flowcore.models import find_architecture
from flowcore.models.flux.layouts import diffusers_config, to_diffusers
from flowcore.models.tinyflux.layouts import current_to_version_3, with_qk_scale
from flowcore.weights.checkpoint import load_model
from flowcore.weights.lora import load_lora

Tensors = dict[str, Tensor]
ARCHS = ("xut", "flux", "tinyflux", "single_stream")
FLUX = find_architecture("flux").presets["tiny"]
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


@pytest.mark.parametrize("name", CASES)
def test_it_loads_with_its_weights(name: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    assert_loads(path, CASES[name], write(CASES[name], path))


@pytest.mark.parametrize("name", CASES)
def test_inspect_says_what_it_is(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    case = CASES[name]
    path = tmp_path / "model.safetensors"
    write(case, path)
    assert main(["inspect", str(path)]) == 0
    said = json.loads(capsys.readouterr().out)
    facts = {
        "kind": "model",
        "architecture": case.arch,
        "version": case.version,
        "layout": case.layout,
        "prefix": case.prefix,
        "others": case.others,
        "missing": [],
        "unexpected": [],
        "wrong_shape": [],
    }
    assert {key: said[key] for key in facts} == facts
    assert said["config"]["hidden_size" if case.arch != "xut" else "dim"] > 0
    assert said["parameters"] > 0
    assert "float32" in said["dtypes"]
    report = load_model(path).report
    for word in (case.version, case.prefix, None if case.layout == "bare" else case.layout):
        assert word is None or word in report


@pytest.mark.parametrize("arch", ARCHS)
def test_every_layout_that_can_be_written_comes_back(arch: str, tmp_path: Path) -> None:
    row = find_architecture(arch)
    case = next(c for c in CASES.values() if c.arch == arch)
    source = tmp_path / "source.safetensors"
    state = write(case, source)
    exports = [found.name for found in row.layouts if found.export and found.name != "v3"]
    for layout in [*layouts_of(row), *exports]:
        target = tmp_path / f"{layout}.safetensors"
        assert main(["convert", str(source), str(target), "--layout", layout]) == 0
        assert_loads(target, case, state)
        back = tmp_path / "back.safetensors"
        convert_file(target, back, "bare")
        original, returned = load_file(source), load_file(back)
        assert all(
            torch.equal(returned[name], tensor) for name, tensor in original.items() if name in returned
        )


def test_a_version_3_file_of_tinyflux_comes_back(tmp_path: Path) -> None:
    state = write(CASES["tinyflux 3"], tmp_path / "old.safetensors")
    convert_file(tmp_path / "old.safetensors", tmp_path / "new.safetensors", "bare")
    convert_file(tmp_path / "new.safetensors", tmp_path / "old again.safetensors", "v3")
    before, after = (load_file(tmp_path / f"{name}.safetensors") for name in ("old", "old again"))
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert_loads(tmp_path / "new.safetensors", CASES["tinyflux 3"], state)


def test_a_diffusers_folder_is_written_whole(tmp_path: Path) -> None:
    config = replace(FLUX, theta=10_000)
    state = state_of("flux", config)
    save_file(state, tmp_path / "a.safetensors", metadata={"flowcore.config": json.dumps(config.to_dict())})
    convert_file(tmp_path / "a.safetensors", tmp_path / "folder", "diffusers")
    files = sorted(file.name for file in (tmp_path / "folder").iterdir())
    assert files == ["config.json", "diffusion_pytorch_model.safetensors"]
    written = json.loads((tmp_path / "folder" / "config.json").read_text(encoding="utf-8"))
    assert written == diffusers_config(config)
    assert_loads(tmp_path / "folder", Case("flux", config), state)


CONTAINERS: dict[str, Callable[[Tensors], Any]] = {
    "bare": as_is,
    "model": lambda s: {"model": s, "optimizer": {}, "step": 3},
    "state_dict": lambda s: {"state_dict": s, "epoch": 1},
    "model_state_dict": lambda s: {"model_state_dict": s, "global_step": 1},
    "ema before raw": lambda s: {
        "model_state_dict": {k: torch.zeros_like(t) for k, t in s.items()},
        "ema_state_dict": s,
        "epoch": 1,
    },
    "shadow": lambda s: {"shadow": s, "decay": 0.999},
}


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("container", CONTAINERS)
def test_torch_files_in_every_container(arch: str, container: str, tmp_path: Path) -> None:
    case = next(c for c in CASES.values() if c.arch == arch)
    state = {name: tensor.clone() for name, tensor in state_of(arch, case.config).items()}
    torch.save(CONTAINERS[container](state), tmp_path / "a.pt")
    assert_loads(tmp_path / "a.pt", case, state)


@pytest.mark.parametrize("name", ["xut diffusers", "flux diffusers", "tinyflux 4.2", "single_stream v3"])
def test_shards_in_a_folder_or_by_their_index(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    state = state_of(case.arch, case.config)
    tensors = {key: tensor.clone() for key, tensor in case.write(state).items()}
    places = {key: f"part-{i % 3}.safetensors" for i, key in enumerate(sorted(tensors))}
    for part in set(places.values()):
        save_file({key: tensors[key] for key in places if places[key] == part}, tmp_path / part)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}), encoding="utf-8")
    (tmp_path / "config.json").write_text(json.dumps(case.config.to_dict()), encoding="utf-8")
    assert_loads(tmp_path, case, state)
    if case.arch != "flux" or not case.is_configured:
        assert_loads(index, case, state)
    assert describe_file(tmp_path)["architecture"] == case.arch


def test_a_folder_of_several_weights_has_a_main_one(tmp_path: Path) -> None:
    case = CASES["tinyflux 4.2"]
    state = write(case, tmp_path / "model.safetensors")
    save_file({name: torch.zeros_like(t) for name, t in state.items()}, tmp_path / "ema.safetensors")
    torch.save({}, tmp_path / "checkpoint.pt")
    assert_loads(tmp_path, case, state)
    (tmp_path / "model.safetensors").rename(tmp_path / "step_1.safetensors")
    with pytest.raises(CheckpointError, match=r"got ema\.safetensors, step_1\.safetensors; name one of them"):
        load_model(tmp_path)


def test_the_settings_of_a_tinyflux_folder_are_read(tmp_path: Path) -> None:
    case = CASES["tinyflux 2"]
    state = write(replace(case, is_configured=False), tmp_path / "pytorch_model.pt")
    settings = {"axes_dims_rope": list(case.config.axes_dims_rope), "t5_pool_mode": "attention"}
    (tmp_path / "model_config.json").write_text(json.dumps(settings), encoding="utf-8")
    assert_loads(tmp_path, case, state)


def test_inspect_names_what_is_missing_too_many_or_misshapen(tmp_path: Path) -> None:
    state = {name: tensor.clone() for name, tensor in state_of("flux", FLUX_128).items()}
    del state["final_layer.linear.bias"]
    state |= {"extra.weight": torch.zeros(1), "txt_in.bias": torch.zeros(3)}
    save_file(state, tmp_path / "a.safetensors")
    said = describe_file(tmp_path / "a.safetensors")
    assert (said["missing"], said["unexpected"]) == (["final_layer.linear.bias"], ["extra.weight"])
    assert said["wrong_shape"] == ["txt_in.bias (3,) instead of (128,)"]
    del state["txt_in.weight"]
    save_file(state, tmp_path / "a.safetensors")
    said = describe_file(tmp_path / "a.safetensors")
    assert said["config"] is None
    assert "must hold txt_in.weight" in said["problem"]


def test_inspect_names_the_preset(tmp_path: Path) -> None:
    write(CASES["flux project"], tmp_path / "a.safetensors")
    assert describe_file(tmp_path / "a.safetensors")["presets"] == ["tiny"]


def _load_vae(path: Path) -> object:
    from flowcore.vae.autoencoder import load_vae

    return load_vae(path)


def _load_gemma(path: Path) -> object:
    from flowcore.text.gemma3 import load_text_encoder

    return load_text_encoder(path)


def _load_t5gemma(path: Path) -> object:
    from flowcore.text.t5gemma2 import load_text_encoder

    return load_text_encoder(path)


def _load_transport(path: Path) -> object:
    from flowcore.flux import load_transport

    return load_transport(path)


def lora_loader(arch: str) -> Callable[[Path], object]:
    case = next(c for c in CASES.values() if c.arch == arch)
    return lambda path: load_lora(path, state_of(arch, case.config), find_architecture(arch))


LOADERS: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "vae": (_load_vae, ()),
    "gemma": (_load_gemma, ()),
    "t5gemma": (_load_t5gemma, ()),
    "transport": (_load_transport, ("flux",)),
    **{f"{arch} lora": (lora_loader(arch), ()) for arch in ARCHS},
}


@pytest.mark.parametrize(
    ("loader", "arch"),
    [(loader, arch) for loader in LOADERS for arch in ARCHS if arch not in LOADERS[loader][1]],
)
def test_a_model_in_the_place_of_another_part_is_named(loader: str, arch: str, tmp_path: Path) -> None:
    load, _ = LOADERS[loader]
    path = tmp_path / "wrong.safetensors"
    write(next(c for c in CASES.values() if c.arch == arch), path)
    with pytest.raises(FlowCoreError) as caught:
        load(path)
    message = str(caught.value)
    assert "\n" not in message
    assert "wrong.safetensors" in message
    assert f"got a {arch} model" in message or f"got {arch}" in message


@pytest.mark.parametrize("made", ARCHS)
@pytest.mark.parametrize("meant", ARCHS)
def test_a_lora_for_another_architecture_is_named(made: str, meant: str, tmp_path: Path) -> None:
    case = next(c for c in CASES.values() if c.arch == made)
    layers = [n for n, t in state_of(made, case.config).items() if n.endswith(".weight") and t.ndim == 2]
    tensors = {}
    for layer in (name.removesuffix(".weight") for name in layers if "blocks" in name):
        tensors[f"diffusion_model.{layer}.lora_A.weight"] = torch.ones(2, 3)
        tensors[f"diffusion_model.{layer}.lora_B.weight"] = torch.ones(3, 2)
    path = tmp_path / "lora.safetensors"
    save_file(tensors, path)
    said = describe_file(path)
    assert (said["kind"], said["architecture"], said["ranks"]) == ("lora", made, [2])
    if made == meant:
        assert lora_loader(meant)(path)
        return
    with pytest.raises(CheckpointError, match=rf"LoRA for this {meant} model, got a LoRA for {made}"):
        lora_loader(meant)(path)


def test_a_lora_in_the_place_of_a_model_is_named(tmp_path: Path) -> None:
    save_file({"lora_unet_a.lora_down.weight": torch.zeros(1)}, tmp_path / "lora.safetensors")
    with pytest.raises(CheckpointError, match=r"an adapter such as .*; load it as a LoRA on top of a model"):
        load_model(tmp_path / "lora.safetensors")


def test_the_qk_scale_of_tinyflux_is_for_strict_readers() -> None:
    config = replace(TINYFLUX, sol_qk_scale=False)
    added = with_qk_scale(state_of("tinyflux", config), config)
    assert added["sol_prior.spatial_to_qk_scale.bias"].eq(1).all()
