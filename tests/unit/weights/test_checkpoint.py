"""Reading, loading and writing weight files; what is said of files that cannot be used."""

import json
import os
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from flowcore.errors import CheckpointError
from flowcore.models.xut import TreadConfig, XUDiT, XUTConfig
from flowcore.models.xut.jax_port import JAX_SETTINGS
from flowcore.weights.checkpoint import build_model, load_model, read_tensors, save_model
from tests.support import ROOT

CONFIG = XUTConfig(dim=32, ctx_dim=12, ctx_size=4, heads=4, dim_head=8, mlp_dim=48, depth=2)


@pytest.fixture
def state() -> dict[str, Tensor]:
    return XUDiT(CONFIG).state_dict()


def same(model: torch.nn.Module, state: dict[str, Tensor]) -> bool:
    return all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_round_trip_keeps_weights_config_and_metadata(tmp_path: Path, state: dict[str, Tensor]) -> None:
    config = replace(CONFIG, residual="prenorm", ln_eps=1e-6)
    file = tmp_path / "model.safetensors"
    save_model(file, state, architecture="xut", config=config, metadata={"flowcore.base_hash": "abc"})
    loaded = load_model(file)
    assert (loaded.architecture.name, loaded.config, loaded.model.training) == ("xut", config, False)
    assert same(loaded.model, state)
    assert loaded.metadata["flowcore.arch"] == "xut"
    assert loaded.metadata["flowcore.base_hash"] == "abc"
    assert loaded.metadata["modelspec.architecture"] == "flowcore/xut"
    assert loaded.metadata["modelspec.title"] == "model"
    assert {"modelspec.sai_model_spec", "modelspec.date"} <= set(loaded.metadata)
    assert loaded.report == f"{file}: xut, {len(state)} tensors"
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


@pytest.mark.parametrize("prefix", ["unet.model.", "model.", "model.diffusion_model."])
def test_prefixes_and_other_contents(tmp_path: Path, state: dict[str, Tensor], prefix: str) -> None:
    others = {"vae_mean": torch.zeros(1, 4, 1, 1), "vae.encoder.conv_in.weight": torch.zeros(2)}
    save_file(
        {**{prefix + name: tensor for name, tensor in state.items()}, **others}, tmp_path / "a.safetensors"
    )
    loaded = load_model(tmp_path / "a.safetensors")
    assert same(loaded.model, state)
    assert loaded.report.endswith(f"tensors, prefix {prefix}, 2 others")


@pytest.mark.parametrize(
    "wrap", [lambda s: s, lambda s: {"state_dict": s, "epoch": 3}, lambda s: {"model": s}]
)
def test_torch_files(tmp_path: Path, state: dict[str, Tensor], wrap) -> None:  # noqa: ANN001
    torch.save(wrap({f"unet.model.{name}": tensor for name, tensor in state.items()}), tmp_path / "a.ckpt")
    assert same(load_model(tmp_path / "a.ckpt").model, state)


def test_old_torch_file(tmp_path: Path, state: dict[str, Tensor]) -> None:
    torch.save(dict(state), tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    assert same(load_model(tmp_path / "a.pt").model, state)


def shard(folder: Path, state: dict[str, Tensor]) -> Path:
    """Write the tensors in two files with an index."""
    names = sorted(state)
    places = {name: f"part-{i % 2}.safetensors" for i, name in enumerate(names)}
    for part in set(places.values()):
        save_file({name: state[name] for name in names if places[name] == part}, folder / part)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}), encoding="utf-8")
    return index


@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_sharded_folder(tmp_path: Path, state: dict[str, Tensor], dtype: torch.dtype | None) -> None:
    shard(tmp_path, state)
    loaded = load_model(tmp_path, dtype=dtype)
    assert len(loaded.model.state_dict()) == len(state)
    if dtype is None:
        assert same(loaded.model, state)
    (tmp_path / "part-1.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"part-1\.safetensors must be there"):
        load_model(tmp_path)


def test_index_and_shards_that_disagree(tmp_path: Path, state: dict[str, Tensor]) -> None:
    index = shard(tmp_path, state)
    places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    index.write_text(json.dumps({"weight_map": {**places, "more": "part-0.safetensors"}}), encoding="utf-8")
    with pytest.raises(CheckpointError, match="got more in none of them"):
        load_model(tmp_path)
    index.write_text("{}", encoding="utf-8")
    with pytest.raises(CheckpointError, match="must be JSON with a weight_map"):
        load_model(tmp_path)


def test_diffusers_folder_gives_its_config(tmp_path: Path) -> None:
    config = replace(
        CONFIG, tread_config=TreadConfig(prev_trns_depth=1, post_trns_depth=1, dropout_ratio=0.25)
    )
    state = {f"model.{name}": tensor for name, tensor in XUDiT(config).state_dict().items()}
    folder = tmp_path / "transformer"
    folder.mkdir()
    save_file(state, folder / "diffusion_pytorch_model.safetensors")
    settings = {"_class_name": "XUDiTConditionModel", **config.to_dict()}
    (folder / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    assert load_model(folder).config == config
    with pytest.raises(CheckpointError, match="got none; name one of its folders transformer"):
        load_model(tmp_path)


def test_dtype_leaves_what_the_model_keeps_in_float32(tmp_path: Path, state: dict[str, Tensor]) -> None:
    half = {name: tensor.half() for name, tensor in state.items()}
    save_file(half, tmp_path / "half.safetensors")
    as_stored = load_model(tmp_path / "half.safetensors").model.state_dict()
    assert {t.dtype for name, t in as_stored.items() if name != "time_emb.freqs"} == {torch.float16}
    assert torch.equal(as_stored["time_emb.freqs"], state["time_emb.freqs"])
    for dtype in (torch.float32, torch.bfloat16):
        converted = load_model(tmp_path / "half.safetensors", dtype=dtype).model.state_dict()
        for name, kept in (
            ("backbone.enc_blocks.0.0.attn.qkv.weight", dtype),
            ("in_patch.proj.weight", torch.float32),
        ):
            assert converted[name].dtype == kept
            assert torch.equal(converted[name], half[name].to(kept))
        assert converted["backbone.enc_blocks.0.0.attn.rope.freqs"].dtype == torch.float32


def test_missing_time_frequencies_are_no_fault(state: dict[str, Tensor]) -> None:
    expected = state.pop("time_emb.freqs")
    assert torch.equal(build_model(state, {}, source="x").model.state_dict()["time_emb.freqs"], expected)


def test_metadata_may_lie_in_a_tensor(tmp_path: Path, state: dict[str, Tensor]) -> None:
    notes = {"flowcore.config": json.dumps(replace(CONFIG, ctx_size=9).to_dict()), "flowcore.arch": "other"}
    raw = torch.tensor(list(json.dumps(notes).encode()), dtype=torch.uint8)
    tensors = {f"diffusion_model.{name}": tensor for name, tensor in state.items()}
    tensors["diffusion_model.flowcore_metadata"] = raw
    save_file(tensors, tmp_path / "a.safetensors", {"flowcore.arch": "xut"})
    loaded = load_model(tmp_path / "a.safetensors")
    assert loaded.config.ctx_size == 9
    assert loaded.metadata["flowcore.arch"] == "xut"  # the file's own metadata wins
    tensors["diffusion_model.flowcore_metadata"] = raw[:9]
    save_file(tensors, tmp_path / "b.safetensors")
    with pytest.raises(CheckpointError, match="flowcore_metadata must be JSON"):
        read_tensors(tmp_path / "b.safetensors")


def test_jax_names_and_arithmetic() -> None:
    tensors, metadata = read_tensors(ROOT / "tests/golden/xut/jax_xudit_concat_shared.safetensors")
    weights = {name[7:]: tensor for name, tensor in tensors.items() if name.startswith("weight.")}
    config = build_model(weights, metadata, source="x").config
    assert {name: getattr(config, name) for name in JAX_SETTINGS} == dict(JAX_SETTINGS)


class Harmful:
    """An object whose unpickling would run a command."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch harmful",)


def bad_files(folder: Path, state: dict[str, Tensor]) -> dict[str, tuple[Path, str]]:
    """Unusable files, and what must be said of each."""
    whole = folder / "whole.safetensors"
    save_file(state, whole)
    files: dict[str, tuple[bytes, str]] = {
        "truncated.safetensors": (whole.read_bytes()[:-100], "must be a complete safetensors file"),
        "short.safetensors": (b"\x05", "must be a complete safetensors file"),
        "empty.safetensors": (b"", "must be a complete safetensors file"),
        "page.safetensors": (b"<!DOCTYPE html>" + b" " * 100, "got a web page"),
        "pointer.safetensors": (b"version https://git-lfs.github.com/spec/v1\n", "got a Git LFS pointer"),
        "noise.ckpt": (b"\x00" * 100, "must be a torch file of tensors"),
        "harmful.ckpt": (pickle.dumps(Harmful(), protocol=2), "must be a torch file of tensors"),
    }
    for name, (content, _) in files.items():
        (folder / name).write_bytes(content)
    found = {name: (folder / name, message) for name, (_, message) in files.items()}
    torch.save([1], folder / "list.pt")
    torch.save(dict(state), folder / "zip.safetensors")
    found["list.pt"] = (folder / "list.pt", "must hold a dictionary of tensors, got list")
    found["zip.safetensors"] = (folder / "zip.safetensors", "got a zip archive (a torch file?")
    found["absent"] = (folder / "absent", "must be a weight file or a folder with one, got nothing there")
    return found


def test_bad_files_are_named(
    tmp_path: Path, state: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for path, message in bad_files(tmp_path, state).values():
        with pytest.raises(CheckpointError) as caught:
            load_model(path)
        text = str(caught.value)
        assert text.startswith(str(path))
        assert message in text
        assert "\n" not in text
    assert not Path("harmful").exists()


def test_wrong_architecture_and_incomplete_models(tmp_path: Path, state: dict[str, Tensor]) -> None:
    file = tmp_path / "a.safetensors"

    def message(tensors: dict[str, Tensor]) -> str:
        save_file(tensors, file)
        with pytest.raises(CheckpointError) as caught:
            load_model(file)
        assert str(caught.value).count(str(file)) == 1
        return str(caught.value)

    assert "got 1 others such as a.weight" in message({"a.weight": torch.zeros(1)})
    name = "backbone.enc_blocks.0.0.attn.out.bias"
    fewer = {key: tensor for key, tensor in state.items() if key != name}
    assert f"1 missing ({name})" in message(fewer)
    assert "1 unexpected (more)" in message({**state, "more": torch.zeros(1)})
    assert f"1 wrong shape ({name} (3,) instead of (32,))" in message({**state, name: torch.zeros(3)})
    odd = {**state, "backbone.dec_blocks.0.0.attn.rope.freqs": torch.zeros(5, 2, 2)}
    assert "dim must be heads * dim_head" in message(odd)


def test_unwritable_target(tmp_path: Path, state: dict[str, Tensor]) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(CheckpointError, match="must be writable"):
        save_model(tmp_path / "file" / "a.safetensors", state, architecture="xut", config=CONFIG)


def test_a_file_that_is_replaced_while_it_is_read(tmp_path: Path, state: dict[str, Tensor]) -> None:
    file = tmp_path / "model.safetensors"
    save_file(state, file)
    tensors, _ = read_tensors(file)
    save_file({name: tensor + 1 for name, tensor in state.items()}, tmp_path / "other.safetensors")
    (tmp_path / "other.safetensors").replace(file)
    with pytest.raises(CheckpointError, match="must stay as it is while it is read, got another file"):
        list(map(torch.Tensor.sum, tensors.values()))
