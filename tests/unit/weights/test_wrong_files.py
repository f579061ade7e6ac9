"""Files in the place of others: one line that names what the file is."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from flowcore.errors import CheckpointError, FlowCoreError
from flowcore.inspection import describe_file
from flowcore.models import find_architecture
from flowcore.weights.checkpoint import load_model
from flowcore.weights.lora import load_lora

from .layouts import ARCHS, CASES, state_of, write


def _load_vae(path: Path) -> object:
    from flowcore.vae.autoencoder import load_vae

    return load_vae(path)


def _load_text(path: Path) -> object:
    from flowcore.text.loading import load_text_encoder

    return load_text_encoder(path)


def _load_transport(path: Path) -> object:
    from flowcore.flux import load_transport

    return load_transport(path)


def lora_loader(arch: str) -> Callable[[Path], object]:
    case = next(c for c in CASES.values() if c.arch == arch)
    return lambda path: load_lora(path, state_of(arch, case.config), find_architecture(arch))


LOADERS: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "vae": (_load_vae, ()),
    "text": (_load_text, ()),
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
    assert f"a {arch} model" in message or f"got {arch}" in message


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
