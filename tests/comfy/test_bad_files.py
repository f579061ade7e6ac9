"""Files that are not what their name says: one sentence each, and the server and earlier results stay."""

import copy
import json
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from flowcore.models import exo, flux
from flowcore.weights.checkpoint import save_model
from tests.comfy.server import Server, ServerError
from tests.comfy.standins import CONFIG, MODEL, TEXT, VAE, write_lora
from tests.unit.weights.layouts import ARCHS, CASES, write

pytestmark = pytest.mark.comfy
Writer = Callable[[Path, Path], object]


def _header(size: int) -> bytes:
    return struct.pack("<Q", size)


def _without(models: Path, path: Path, *names: str) -> None:
    tensors = load_file(models / "diffusion_models" / MODEL)
    save_file({name: tensor for name, tensor in tensors.items() if name not in names}, path)


def _with(models: Path, path: Path, change: Callable[[str, torch.Tensor], torch.Tensor]) -> None:
    tensors = load_file(models / "diffusion_models" / MODEL)
    save_file({name: change(name, tensor).contiguous() for name, tensor in tensors.items()}, path)


def _half(models: Path, path: Path) -> None:
    whole = (models / "diffusion_models" / MODEL).read_bytes()
    path.write_bytes(whole[: len(whole) // 2])


def _metadata(models: Path, path: Path, config: str) -> None:
    save_file(load_file(models / "diffusion_models" / MODEL), path, {"flowcore.config": config})


def _copy(folder: str, file: str) -> Writer:
    return lambda models, path: path.write_bytes((models / folder / file).read_bytes())


def _sequences(_: Path, path: Path) -> None:
    config = flux.PRESETS["points"]
    save_model(path, flux.Flux(config).state_dict(), architecture="flux", config=config)


def _exo(_: Path, path: Path) -> None:
    config = exo.PRESETS["tiny"]
    save_model(path, exo.Exo(config).state_dict(), architecture="exo", config=config)


INCOMPLETE = "must be a complete safetensors file"
ABSURD = '{"ctx_size": -3, "residual": "none"}'
MODELS: dict[str, tuple[Writer, str]] = {
    "empty": (lambda _, path: path.write_bytes(b""), INCOMPLETE),
    "web_page": (lambda _, path: path.write_text("<!DOCTYPE html><html></html>"), "got a web page"),
    "random": (lambda _, path: path.write_bytes(bytes(range(256)) * 40), INCOMPLETE),
    "huge_header": (lambda _, path: path.write_bytes(_header(2**62) + b"{}"), INCOMPLETE),
    "broken_header": (lambda _, path: path.write_bytes(_header(8) + b'{"a": 1 '), INCOMPLETE),
    "truncated": (_half, INCOMPLETE),
    "text_encoder": (_copy("text_encoders", TEXT), "a text encoder"),
    "vae": (_copy("vae", VAE), "a VAE"),
    "adapter": (lambda _, path: write_lora(path), "load it as a LoRA"),
    "one_scalar": (
        lambda _, path: save_file({"x": torch.tensor(1.0)}, path),
        r"must be those of a .*xut.* model",
    ),
    "another_architecture": (_exo, "got exo, which runs in plain Python only"),
    "no_pictures": (_sequences, "got one of other sequences; load it with Load Flux Sequences"),
    "missing_tensor": (
        lambda models, path: _without(models, path, "out_patch.proj.bias"),
        r"1 missing \(out_patch.proj.bias\)",
    ),
    "wrong_shape": (
        lambda models, path: _with(models, path, lambda name, t: t[:-1] if name == "ctx_proj.bias" else t),
        r"ctx_proj.bias \(63,\) instead of \(64,\)",
    ),
    "whole_numbers": (
        lambda models, path: _with(models, path, lambda _, t: t.to(torch.int8)),
        "must be floating-point numbers, got torch.int8",
    ),
    "absurd_metadata": (lambda models, path: _metadata(models, path, ABSURD), "residual must be one of"),
    "broken_metadata": (lambda models, path: _metadata(models, path, "{"), "flowcore.config must be JSON"),
}


def one_line(error: pytest.ExceptionInfo[ServerError]) -> str:
    message = str(error.value)
    assert "\n" not in message.strip()
    assert len(message) < 700
    return message


@pytest.mark.parametrize("name", sorted(MODELS))
def test_a_bad_model_is_named_in_one_sentence(
    server: Server, base: Path, prompt: dict[str, Any], name: str
) -> None:
    server.run(prompt)
    outputs = {path: path.read_bytes() for path in (base / "output").rglob("*.png")}
    write, expected = MODELS[name]
    path = base / "models" / "diffusion_models" / f"{name}.safetensors"
    write(base / "models", path)
    bad = copy.deepcopy(prompt)
    bad["1"]["inputs"]["model_name"] = path.name
    with pytest.raises(ServerError) as error:
        server.run(bad)
    message = one_line(error)
    assert path.name in message
    assert re.search(expected, message), message
    assert server.is_alive()
    assert all(file.read_bytes() == content for file, content in outputs.items())
    server.run(prompt)
    path.unlink()


def test_a_pickle_with_code_is_not_run(server: Server, base: Path, prompt: dict[str, Any]) -> None:
    marker = base / "ran"
    path = base / "models" / "diffusion_models" / "code.pt"
    path.write_bytes(b"cos\nsystem\n(S'touch " + str(marker).encode() + b"'\ntR.")
    prompt["1"]["inputs"]["model_name"] = path.name
    with pytest.raises(ServerError, match="must be a torch file of tensors in plain containers") as error:
        server.run(prompt)
    one_line(error)
    assert not marker.exists()
    path.unlink()


def test_bad_text_encoders_and_vaes_are_named(server: Server, base: Path, prompt: dict[str, Any]) -> None:
    models = base / "models"
    (models / "text_encoders" / "bad.safetensors").write_bytes((models / "vae" / VAE).read_bytes())
    (models / "vae" / "bad.safetensors").write_bytes((models / "text_encoders" / TEXT).read_bytes())
    for node, label, expected in (
        ("2", "clip_name", "bad.safetensors must (hold|come)"),
        ("3", "vae_name", "bad.safetensors must hold a KL"),
    ):
        bad = copy.deepcopy(prompt)
        bad[node]["inputs"][label] = "bad.safetensors"
        with pytest.raises(ServerError, match=expected) as error:
            server.run(bad)
        one_line(error)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(
    ("node", "label", "folder"), [("2", "clip_name", "text_encoders"), ("3", "vae_name", "vae")]
)
def test_a_model_in_the_place_of_another_part_is_named(
    server: Server, base: Path, prompt: dict[str, Any], node: str, label: str, folder: str, arch: str
) -> None:
    path = base / "models" / folder / f"wrong_{arch}.safetensors"
    write(next(case for case in CASES.values() if case.arch == arch), path)
    prompt[node]["inputs"][label] = path.name
    with pytest.raises(ServerError) as error:
        server.run(prompt)
    message = one_line(error)
    assert path.name in message
    assert f"a {arch} model" in message or f"got {arch}" in message
    path.unlink()


@pytest.mark.parametrize(
    "name", ["absent.safetensors", "../../../secret.safetensors", "flowcore-scenes-vae.safetensors"]
)
def test_an_absent_file_is_refused_before_anything_runs(
    server: Server, prompt: dict[str, Any], name: str
) -> None:
    prompt["1"]["inputs"]["model_name"] = name
    with pytest.raises(ServerError) as error:
        server.run(prompt)
    answer = json.loads(str(error.value))
    (fault,) = answer["node_errors"]["1"]["errors"]
    assert "must be a file in ComfyUI's folder models/diffusion_models" in fault["details"]
    assert server.is_alive()


def test_parts_that_do_not_fit_each_other_are_named(
    server: Server, base: Path, prompt: dict[str, Any]
) -> None:
    from dataclasses import replace

    from tests.comfy.standins import write_model

    path = base / "models" / "diffusion_models" / "wider.safetensors"
    write_model(path, config=replace(CONFIG, ctx_dim=48))
    wide = copy.deepcopy(prompt)
    wide["1"]["inputs"]["model_name"] = path.name
    with pytest.raises(
        ServerError, match="text states for this model must be 48 wide, got 32; load the text encoder"
    ) as error:
        server.run(wide)
    one_line(error)
    prompt["6"] = {
        "class_type": "EmptyImage",
        "inputs": {"width": 128, "height": 128, "batch_size": 1, "color": 65280},
    }
    prompt["41"] = {"class_type": "FlowCoreLoadVAE", "inputs": {"vae_name": "four.safetensors"}}
    prompt["42"] = {"class_type": "VAEEncode", "inputs": {"pixels": ["6", 0], "vae": ["41", 0]}}
    prompt["7"]["inputs"]["latent_image"] = ["42", 0]
    _write_four_channels(base / "models" / "vae" / "four.safetensors")
    with pytest.raises(
        ServerError, match=r"latents for this model must have 16 channels .*encode with the VAE"
    ) as error:
        server.run(prompt)
    one_line(error)


def _write_four_channels(path: Path) -> None:
    """Write a VAE that states no latent space, with a width that can be inferred."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    module = AutoencoderKL(
        latent_channels=4, block_out_channels=(32,) * 4, layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    )  # fmt: skip
    save_file(module.state_dict(), path)
