"""LoRA files as the project writes them in ComfyUI's stock loader: no key is left, results are as merged."""

import copy
import json
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from flowcore.models import find_architecture
from flowcore.weights.checkpoint import load_model, save_model
from flowcore.weights.lora import layer_shapes, load_lora, merged_tensors
from flowcore.weights.lora_writing import LoraPair, save_lora
from tests.comfy.server import Server, environment
from tests.comfy.standins import MODEL, file_of
from tests.comfy.test_server import Prompt, latent_of, node
from tests.support import CHAIN_LIMIT, FORWARD_LIMIT, assert_close

pytestmark = pytest.mark.comfy
PROCESS = Path(__file__).with_name("lora_process.py")
LAYOUTS: tuple[str, ...] = ("diffusion_model", "kohya")
NAMES = ("xut", "flux", "tinyflux", "single_stream")
"""Exo's adapter is a part of its own file."""
STRENGTH = 0.7


@pytest.fixture(scope="module")
def loaded(
    comfyui: Path, comfyui_python: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, list[str]]]:
    """Folder of the files, and the keys that ComfyUI left of each."""
    folder = tmp_path_factory.mktemp("loras")
    for name in NAMES:
        row = find_architecture(name)
        torch.manual_seed(0)
        state = {key: t.clone() for key, t in row.model(row.presets["tiny"]).state_dict().items()}
        save_file(state, folder / f"{name}.base.safetensors")
        pairs = {
            layer: LoraPair(torch.randn(2, width), torch.randn(height, 2), 3.0)
            for layer, (height, width) in layer_shapes(state).items()
        }
        for layout in LAYOUTS:
            save_lora(folder / f"{name}.lora.{layout}.safetensors", pairs, architecture=row, layout=layout)
    command = [str(comfyui_python), str(PROCESS), str(comfyui), str(folder)]
    done = subprocess.run(
        command, cwd=comfyui, env=environment(), capture_output=True, text=True, timeout=1200, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return folder, json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", NAMES)
def test_no_key_is_left_and_the_weights_are_ours(
    name: str, layout: str, loaded: tuple[Path, dict[str, list[str]]]
) -> None:
    folder, left = loaded
    file = folder / f"{name}.lora.{layout}.safetensors"
    assert left[file.name] == []
    state = load_file(folder / f"{name}.base.safetensors")
    ours = merged_tensors(state, load_lora(file, state, find_architecture(name)))
    theirs = load_file(folder / f"merged.{file.name}")
    assert set(theirs) == set(ours) == {f"{layer}.weight" for layer in layer_shapes(state)}
    for key, tensor in ours.items():
        assert_close(theirs[key], tensor, limit=FORWARD_LIMIT, what=key)


def name_of(architecture: str, layout: str) -> str:
    """The name of a LoRA file: the loader keeps one that it has read under a name."""
    return f"{architecture}-{layout}.safetensors"


def write_files(base: Path, architecture: str, layouts: tuple[str, ...]) -> None:
    """LoRA files of every layer of a stand-in, and the stand-in with what they do merged into it."""
    models = base / "models"
    source = models / "diffusion_models" / (MODEL if architecture == "xut" else file_of(architecture))
    model = load_model(source)
    row, state = model.architecture, dict(model.model.state_dict())
    generator = torch.Generator().manual_seed(8)
    pairs = {
        layer: LoraPair(
            torch.randn(2, shape[1], generator=generator) * 0.2,
            torch.randn(shape[0], 2, generator=generator) * 0.2,
            3.0,
        )
        for layer, shape in layer_shapes(state).items()
    }
    for layout in layouts:
        save_lora(models / "loras" / name_of(architecture, layout), pairs, architecture=row, layout=layout)
    lora = load_lora(models / "loras" / name_of(architecture, layouts[0]), state, row)
    save_model(
        models / "diffusion_models" / "merged.safetensors",
        {**state, **merged_tensors(state, lora, STRENGTH)},
        architecture=architecture,
        config=model.config,
        metadata=model.metadata,
    )


@pytest.mark.parametrize("architecture", NAMES)
def test_the_stock_loader_acts_as_merging_does(
    server: Server, base: Path, prompt: Prompt, architecture: str
) -> None:
    layouts = (*LAYOUTS, "diffusers") if architecture == "flux" else LAYOUTS
    write_files(base, architecture, layouts)
    prompt["1"]["inputs"]["model_name"] = MODEL if architecture == "xut" else file_of(architecture)
    prompt["7"]["inputs"]["steps"] = 2
    plain = latent_of(server, prompt)
    merged = copy.deepcopy(prompt)
    merged["1"]["inputs"]["model_name"] = "merged.safetensors"
    expected = latent_of(server, merged)
    assert not torch.allclose(expected, plain, atol=0.1)
    for layout in layouts:
        inputs = {"lora_name": name_of(architecture, layout), "strength_model": STRENGTH}
        prompt["30"] = node("LoraLoaderModelOnly", model=["1", 0], **inputs)
        prompt["7"]["inputs"]["model"] = ["30", 0]
        before = len(server.log())
        assert_close(latent_of(server, prompt), expected, limit=CHAIN_LIMIT, what=layout)
        assert "lora key not loaded" not in server.log()[before:]
    prompt["30"]["inputs"]["strength_model"] = 0.0
    assert torch.equal(latent_of(server, prompt), plain)
