"""What loading takes: at its peak at most 1.2 times the file, or what is loaded where that is more.

Files of 25 to 120 MB, each loaded as stored and in another dtype.
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from flowcore.models import ModelConfig, find_architecture
from flowcore.models.exo.trunk_config import TRUNKS
from flowcore.models.flux.layouts import to_diffusers
from tests.support import run_python
from tests.unit.text.small import (
    CLIP_SETTINGS,
    T5_SETTINGS,
    T5GEMMA2_TEXT,
    clip_tokenizer,
    gemma_tokenizer,
    t5_tokenizer,
)

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
LIMIT = 1.2
Case: TypeAlias = tuple[str, Path, str | None]
"""What is loaded, from where, and in which dtype; None = as stored."""

COUNTER = """
import json, sys, torch

def kibibytes(field):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(field))

def start():
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak counts from here
    return kibibytes("VmRSS")
"""

CONVERT = f"""{COUNTER}
from flowcore.inspection import convert_file

source, target, *layouts = sys.argv[1:]
for layout in ("bare", *layouts):  # the first one counts whatever is imported, and is left out
    before = start()
    convert_file(source, target, layout)
    print((kibibytes("VmHWM") - before) * 1024)
"""

MEASURE = f"""{COUNTER}

def load(kind, path, dtype):
    if kind == "model":
        from flowcore.weights.checkpoint import load_model
        return load_model(path, dtype=dtype).model
    if kind == "vae":
        from flowcore.vae.autoencoder import load_vae
        return load_vae(path, spec="flux1", dtype=dtype).module
    if kind == "trunk":
        from flowcore.weights.exo import load_trunk
        return load_trunk(path, dtype=dtype)
    from dataclasses import replace
    from importlib import import_module
    from flowcore.text.files import read_text_files
    if kind == "clip":  # of no use alone
        (files,) = read_text_files(path)
        return import_module("flowcore.text.clip").from_files(replace(files, dtype=dtype))
    from flowcore.text.loading import load_text_encoder
    return load_text_encoder(path, dtype=dtype)

cases = json.loads(sys.argv[1])
for kind, path, _ in {{case[0]: case for case in cases}}.values():
    load(kind, path, None)  # whatever the first load of a kind imports
for kind, path, dtype in cases:
    before = start()
    loaded = load(kind, path, None if dtype is None else getattr(torch, dtype))
    weights = [weight.detach() for weight in getattr(loaded, "model", loaded).parameters()]
    total = sum(float(weight.sum()) for weight in weights)  # every weight is read
    largest = max(weights, key=torch.numel)
    assert dtype in (None, str(largest.dtype).split(".")[1])
    size = sum(weight.nbytes for weight in weights)
    del loaded, weights, largest
    print((kibibytes("VmHWM") - before) * 1024, size)
"""


def check(cases: list[Case]) -> None:
    """Limit the growth of one process at the peak of each load."""
    told = json.dumps([(kind, str(path), dtype) for kind, path, dtype in cases])
    result = run_python("-c", MEASURE, told, MALLOC_MMAP_THRESHOLD_="65536")
    assert result.returncode == 0, result.stderr
    found = {}
    for (_, path, dtype), line in zip(cases, result.stdout.splitlines(), strict=True):
        peak, loaded = map(int, line.split())
        files = path.glob("*.safetensors") if path.is_dir() else [path]
        found[f"{path.name} as {dtype}"] = peak / max(loaded, sum(file.stat().st_size for file in files))
    assert max(found.values()) <= LIMIT, found


def zeros(state: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: torch.zeros(tensor.shape, dtype=dtype) for name, tensor in state.items()}


def in_shards(state: Mapping[str, Tensor], folder: Path) -> Path:
    folder.mkdir()
    places = {name: f"part-{number % 2}.safetensors" for number, name in enumerate(state)}
    for file in set(places.values()):
        save_file({name: state[name] for name in state if places[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return folder


def flux_config() -> ModelConfig:
    row = find_architecture("flux")
    return row.config_from_dict(
        {
            **row.presets["flux-dev"].to_dict(),
            "hidden_size": 512,
            "num_heads": 4,
            "depth": 3,
            "depth_single_blocks": 4,
            "context_in_dim": 64,
            "vec_in_dim": 64,
        }
    )


def test_memory_of_conversion(tmp_path: Path) -> None:
    """Names alone, and layers that are cut, joined and swapped."""
    state = find_architecture("flux").model(flux_config(), device="meta").state_dict()
    save_file(zeros(state, torch.float32), tmp_path / "in.safetensors")
    files = [str(tmp_path / name) for name in ("in.safetensors", "out.safetensors")]
    layouts = ("diffusion_model", "diffusers")
    result = run_python("-c", CONVERT, *files, *layouts, MALLOC_MMAP_THRESHOLD_="65536")
    assert result.returncode == 0, result.stderr
    _, *peaks = map(int, result.stdout.split())
    assert len(peaks) == 2
    assert max(peaks) <= LIMIT * (tmp_path / "in.safetensors").stat().st_size


def test_memory_of_models(tmp_path: Path) -> None:
    row, config = find_architecture("flux"), flux_config()
    wide, narrow = (
        zeros(row.model(config, device="meta").state_dict(), dtype)
        for dtype in (torch.float32, torch.bfloat16)
    )
    save_file(wide, tmp_path / "wide.safetensors")
    save_file(narrow, tmp_path / "narrow.safetensors")
    torch.save({"state_dict": narrow}, tmp_path / "narrow.pt")
    torch.save({"state_dict": wide}, tmp_path / "wide.pt")
    in_shards(wide, tmp_path / "wide_shards")
    foreign = {name: tensor.contiguous() for name, tensor in to_diffusers(narrow, config).items()}
    in_shards(foreign, tmp_path / "narrow_diffusers")
    names = {
        "wide.safetensors": "bfloat16",
        "narrow.safetensors": "float32",
        "wide.pt": "bfloat16",
        "narrow.pt": "float32",
        "wide_shards": "bfloat16",
        "narrow_diffusers": "float32",
    }
    cases = [("model", tmp_path / name, dtype) for name in names for dtype in (None, names[name])]
    check(cases)


def test_memory_of_autoencoders(tmp_path: Path) -> None:
    from flowcore.vae.network import build_autoencoder

    config: dict[str, Any] = {
        "latent_channels": 16,
        "block_out_channels": [64, 128, 256, 256],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "layers_per_block": 2,
    }

    state = build_autoencoder(config, device="meta").state_dict()

    def write(name: str, dtype: torch.dtype) -> Path:
        path = tmp_path / f"{name}.safetensors"
        save_file(zeros(state, dtype), path, {"flowcore.config": json.dumps(config)})
        return path

    wide, narrow = write("wide", torch.float32), write("narrow", torch.bfloat16)
    cases = [(wide, None), (wide, "bfloat16"), (narrow, None), (narrow, "float32")]
    check([("vae", path, dtype) for path, dtype in cases])


def text_encoders() -> dict[str, tuple[dict[str, Any], nn.Module, PreTrainedTokenizerFast]]:
    """Settings, network without weights, and tokenizer of every kind."""
    from flowcore.text import clip, gemma3, t5, t5gemma2

    sizes = {"hidden_size": 768, "intermediate_size": 4096}
    t5_config = {**T5_SETTINGS, "model_type": "t5", "vocab_size": 4000, "d_model": 768, "d_ff": 2048}
    clip_config = {**CLIP_SETTINGS, **sizes, "model_type": "clip_text_model", "num_attention_heads": 12}
    t5gemma2_config = {**T5GEMMA2_TEXT, **sizes, "model_type": "t5gemma2_text"}
    gemma3_config = {**T5GEMMA2_TEXT, **sizes, "model_type": "gemma3_text"}
    t5_network = t5.build_network(t5_config, source="t5")
    del t5_network.encoder.embed_tokens.weight  # the same as the shared one
    return {
        "t5": (t5_config, t5_network, t5_tokenizer()),
        "clip": (clip_config, clip.build_network(clip_config, source="clip"), clip_tokenizer()),
        "t5gemma2": (
            t5gemma2_config,
            t5gemma2.build_network(t5gemma2_config, source="t5gemma2", device="meta"),
            gemma_tokenizer(),
        ),
        "gemma3": (gemma3_config, gemma3.build_text_model(gemma3_config, device="meta"), gemma_tokenizer()),
    }


def test_memory_of_text_encoders_and_trunks(tmp_path: Path) -> None:
    from flowcore.models.exo.trunk import build_trunk

    trunk = TRUNKS["small"]
    parts = {"trunk": ({"model_type": "qwen3_vl", **trunk}, build_trunk(trunk, device="meta"), None)}
    cases: list[Case] = []
    for kind, (config, network, tokenizer) in {**text_encoders(), **parts}.items():
        for stored, asked in ((torch.float32, "bfloat16"), (torch.bfloat16, "float32")):
            folder = tmp_path / f"{kind} in {stored}"
            folder.mkdir()
            save_file(zeros(network.state_dict(), stored), folder / "model.safetensors")
            (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
            cases += [(kind, folder, None), (kind, folder, asked)]
    check(cases)
