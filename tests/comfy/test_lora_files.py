"""LoRA files as the project writes them, in ComfyUI's stock loader: no key is left, and the weights agree."""

import json
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from flowcore.models import find_architecture
from flowcore.weights.lora import layer_shapes, load_lora, merged_tensors
from flowcore.weights.lora_writing import LoraLayout, LoraPair, save_lora
from tests.comfy.server import environment
from tests.support import FORWARD_LIMIT, assert_close

pytestmark = pytest.mark.comfy
PROCESS = Path(__file__).with_name("lora_process.py")
LAYOUTS: tuple[LoraLayout, ...] = ("diffusion_model", "kohya")
NAMES = ("xut", "flux", "tinyflux", "single_stream")
"""Exo's adapter is a part of its own file."""


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
    name: str, layout: LoraLayout, loaded: tuple[Path, dict[str, list[str]]]
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
