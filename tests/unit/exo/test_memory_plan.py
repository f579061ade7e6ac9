"""The memory plan: exact for weights, keys and values; near for the work; verdicts and remedies."""

import gc
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import psutil
import pytest
import torch
from torch import nn

from flowcore.__main__ import main
from flowcore.errors import ConfigError
from flowcore.exo import ExoPipeline, TrunkOptions
from flowcore.exo.dry_run import PUBLISHED, Request, file_plan, preset_plan
from flowcore.exo.memory_plan import Plan, fits, parse_memory, plan_table, stages, state_bytes, weight_bytes
from flowcore.exo.quantized import quantize
from flowcore.images import image_to_tensor
from flowcore.models.exo import PRESETS, Exo
from flowcore.vae.autoencoder import load_vae
from flowcore.vae.network import build_autoencoder
from flowcore.weights.placement import move
from tests import tiny, tiny_exo
from tests.bench.measure import peak_mib, reset_peak
from tests.unit.exo.test_pipeline import picture

NEAR = 2.0
"""Factor between the estimate of work inside layers and what the process was seen to take."""


def bytes_of(*modules: nn.Module) -> int:
    """Element by element: the sum over parameters and buffers."""
    tensors = [t for module in modules for t in (*module.parameters(), *module.buffers())]
    return sum(t.numel() * t.element_size() for t in tensors)


def plan_of(name: str, **changes: object) -> Plan:
    return replace(preset_plan(name, Request()), **changes)


@pytest.mark.parametrize("preset", ["tiny", "demo"])
@pytest.mark.parametrize(
    ("trunk", "dtype"),
    [("float32", torch.float32), ("bfloat16", torch.bfloat16), ("int8", torch.bfloat16)],
)
def test_weights_equal_those_of_a_real_model(preset: str, trunk: str, dtype: torch.dtype) -> None:
    model = Exo(PRESETS[preset])
    if trunk == "int8":
        quantize(model.trunk, trunk)
    move(model, None, dtype)
    found = weight_bytes(plan_of(preset, trunk=trunk, dtype=dtype))
    text = model.trunk.language_model
    assert found["trunk, decoder layers"] == bytes_of(text.layers)
    assert found["trunk, embedding"] == bytes_of(text) - bytes_of(text.layers)
    assert found["trunk, vision tower"] == bytes_of(model.trunk.visual)
    assert found["own parameters"] == bytes_of(model) - bytes_of(model.trunk)
    assert sum(found.values()) - found["autoencoder"] == bytes_of(model)
    assert found["autoencoder"] == bytes_of(load_vae("scenes-vae").module)


def test_keys_and_values_equal_those_of_a_real_prompt(tmp_path: Path) -> None:
    pipeline = ExoPipeline.from_pretrained(tiny_exo.write_parts(tmp_path), device="cpu")
    pictures = image_to_tensor(picture(), 64, 32).repeat(2, 1, 1, 1)
    state = pipeline.encode_prompt(["a red circle", ""], pictures, size=(32, 64))
    plan = plan_of(
        "tiny",
        width=64,
        height=32,
        prompt_tokens=state.keep.shape[1] - 12 - 2,
        visual_tokens=2,
        trunk="float32",
        dtype=torch.float32,
    )
    found = state_bytes(plan)
    size = sum(t.numel() * t.element_size() for layer in state.past.layers for t in layer)
    assert found["keys and values of the trunk"] == size
    assert found["keys and values of the head"] == sum(
        t.numel() * t.element_size() for read in state.reads for t in read
    )
    assert found["features of pictures"] == state.features.numel() * 4


@pytest.mark.skipif(sys.platform != "linux", reason="the memory peak is read from /proc")
def test_work_is_near_what_a_process_takes() -> None:
    """A decoded picture and a step of 320 x 320 with the demo's sizes, each in a process of its own."""
    plan = plan_of("demo", width=320, height=320, prompt_tokens=28, trunk="float32", dtype=torch.float32)
    found = state_bytes(plan)
    for call, part in ((decode, "work of decoding"), (step, "work of a step")):
        taken = taken_by(call)
        assert found[part] / NEAR <= taken <= found[part] * NEAR, (part, taken, found[part])


def decode() -> Callable[[], object]:
    vae, z = load_vae("scenes-vae"), torch.randn(1, 16, 40, 40)
    return lambda: vae.decode(z)


def step() -> Callable[[], object]:
    model, z, t = Exo(PRESETS["demo"]).eval(), torch.randn(2, 16, 40, 40), torch.tensor([0.5, 0.5])
    prefix = model.encode(torch.full((2, 40), 97), size=(40, 40))
    return lambda: model.step(z, t, prefix, iterations=1)


@torch.inference_mode()
def measure(made: Callable[[], Callable[[], object]]) -> int:
    """Bytes by which one call raises this process's peak."""
    call = made()
    gc.collect()
    reset_peak("cpu")
    before = psutil.Process().memory_info().rss
    call()
    return int(peak_mib("cpu") * 2**20) - before


def taken_by(made: Callable[[], Callable[[], object]]) -> int:
    """`measure` in a new process, whose heap holds nothing that was freed."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(measure, made).result()


def test_the_8b_preset_and_what_makes_it_smaller() -> None:
    """The published sizes: trunk without its output layer 15.14 GB, tower 1.15, own 2.51."""
    request = Request(prompt=" " * 900, has_picture=True)
    plan = preset_plan("8b", request)
    found = weight_bytes(plan)
    assert found["trunk, embedding"] + found["trunk, decoder layers"] == pytest.approx(15.14e9, rel=1e-3)
    assert found["trunk, vision tower"] == pytest.approx(1.153e9, rel=1e-3)
    assert found["own parameters"] == pytest.approx(2.5126e9, rel=1e-3)
    assert fits(plan, 32 * 10**9)
    assert not fits(plan, 24 * 10**9)
    away = preset_plan("8b", replace(request, trunk=TrunkOptions(offload="vision"), tile=512))
    assert fits(away, 24 * 10**9)
    assert "trunk, vision tower" not in stages(away)["steps"]
    assert "trunk, vision tower" in stages(away)["reading the prompt"]
    eight = preset_plan("8b", replace(request, trunk=TrunkOptions(dtype="int8", offload="vision"), tile=512))
    four = preset_plan("8b", replace(request, trunk=TrunkOptions(dtype="nf4", offload="vision"), tile=512))
    assert fits(eight, 16 * 10**9)
    assert fits(four, 12 * 10**9)
    assert weight_bytes(four)["trunk, decoder layers"] == pytest.approx(6.946e9 * (0.5 + 1 / 64), rel=5e-3)
    layers = preset_plan("8b", replace(request, trunk=TrunkOptions(offload="layers"), tile=512))
    assert fits(layers, 9 * 10**9)
    plain = preset_plan("8b", replace(request, is_guided=False, has_picture=False))
    assert (
        state_bytes(plain)["keys and values of the trunk"] * 2
        < state_bytes(plan)["keys and values of the trunk"]
    )


def test_remedies_lead_on() -> None:
    request = Request()
    for options, remedy in (
        (TrunkOptions(), "--trunk-dtype"),
        (TrunkOptions(dtype="nf4"), "--offload vision"),
        (TrunkOptions(dtype="nf4", offload="vision"), "--tile"),
    ):
        text = plan_table(preset_plan("8b", replace(request, trunk=options)), 10**9)
        assert "does not fit 1.000 GB; " in text
        assert remedy in text
    assert plan_table(preset_plan("8b", request), 80 * 10**9).endswith("fits 80.000 GB")


def test_published_autoencoders() -> None:
    common = {
        "block_out_channels": [128, 256, 512, 512],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "layers_per_block": 2,
        "norm_num_groups": 32,
    }
    flux2 = build_autoencoder({**common, "latent_channels": 32, "batch_norm_eps": 1e-4}, device="meta")
    quants = {"use_quant_conv": False, "use_post_quant_conv": False}
    flux1 = build_autoencoder({**common, "latent_channels": 16, **quants}, device="meta")
    for channels, module in ((128, flux2), (16, flux1), (64, flux1)):
        assert PUBLISHED[channels].parameters == sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(
    ("text", "amount"), [("32GB", 32 * 10**9), ("24 GiB", 24 * 2**30), ("512mb", 512 * 10**6), ("77", 77)]
)
def test_amounts_of_memory(text: str, amount: int) -> None:
    assert parse_memory(text) == amount


def test_wrong_requests_are_named(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"memory must be a number with a unit, such as 32GB .*, got 'much'"
    ):
        parse_memory("much")
    with pytest.raises(ConfigError, match=r"presets of exo must be among tiny, demo, .*, got '7b'"):
        preset_plan("7b", Request())
    with pytest.raises(ConfigError, match=r"must be of an exo model, got xut in model\.safetensors"):
        file_plan(tiny.write_parts(tmp_path), Request())


def test_a_dry_run_says_what_a_picture_takes_and_makes_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = str(tiny_exo.write_parts(tmp_path))
    options = ["--dry-run", "--memory", "1GB", "--trunk-dtype", "int8", "--cfg", "1", "--init", "none.png"]
    assert main(["a red circle", "--model", model, *options]) == 0
    printed = capsys.readouterr().out.splitlines()
    # 12 bytes and the chat's tokens; 2 x 2 visual tokens of 64 x 48 pixels, rounded to whole ones
    assert printed[-2].startswith(
        "64 x 48, 1 at once, 1 branches, 28 prompt tokens, trunk int8, offload none"
    )
    assert printed[-1] == "fits 1.000 GB"
    assert any(line.startswith("trunk, vision tower") for line in printed)
    assert not list(tmp_path.glob("*.png"))
    assert main(["budget", "exo", "8b", "--memory", "24GB", "--offload", "vision"]) == 0
    assert "does not fit 24.000 GB; take a trunk of int8" in capsys.readouterr().out
