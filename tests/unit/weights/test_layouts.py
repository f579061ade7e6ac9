"""Every layout that files of the architectures come in: recognised, loaded, described, and converted."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from flowcore.__main__ import main
from flowcore.errors import CheckpointError
from flowcore.inspection import convert_file, describe_file, layouts_of
from flowcore.models import find_architecture
from flowcore.models.flux.layouts import diffusers_config
from flowcore.models.tinyflux.layouts import with_qk_scale
from flowcore.weights.checkpoint import load_model

from .layouts import (
    ARCHS,
    CASES,
    FLUX,
    FLUX_128,
    TINYFLUX,
    Case,
    Tensors,
    as_is,
    assert_loads,
    state_of,
    write,
)


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
        "layout": case.prefix.rstrip(".") or "bare" if case.layout == "bare" else case.layout,
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
    assert describe_file(tmp_path / "a.safetensors")["presets"] == ["points"]


def test_the_qk_scale_of_tinyflux_is_for_strict_readers() -> None:
    config = replace(TINYFLUX, sol_qk_scale=False)
    added = with_qk_scale(state_of("tinyflux", config), config)
    assert added["sol_prior.spatial_to_qk_scale.bias"].eq(1).all()
