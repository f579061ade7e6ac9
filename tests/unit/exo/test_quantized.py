"""Trunks in fewer bits and in other places: near to the whole one, and named when they cannot be."""

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from flowcore.errors import ConfigError
from flowcore.exo import ExoPipeline, ExoSettings, TrunkOptions
from flowcore.exo.offload import brought, check_offload, decoder_layers, place, streamed
from flowcore.exo.quantized import Int8Linear, quantize
from flowcore.exo.trace import Trace
from flowcore.ops import Runtime
from flowcore.pipeline import Pipeline
from tests import tiny, tiny_exo
from tests.exo_recomputed import random_exo
from tests.support import assert_close, spread_of

IDS = torch.tensor([[256, 97, 98, 99, 257]])
SETTINGS = ExoSettings(num_steps=2, width=32, height=32, iterations=2)


def latents_of(pipeline: ExoPipeline) -> Tensor:
    trace = Trace(pipeline.device)
    return pipeline.sample_refined(["a red circle"], [1], pipeline.sized(SETTINGS), trace=trace)


def test_a_layer_of_8_bits_is_near_the_whole_one() -> None:
    linear, x = nn.Linear(64, 48), torch.randn(2, 5, 64)
    found = Int8Linear(linear)
    assert found.weight.dtype == torch.int8
    assert int(found.weight.abs().amax(dim=1).min()) == 127
    linear.requires_grad_(False)
    restored = found.weight * found.scale[:, None]
    steps = (restored - linear.weight).abs() / found.scale[:, None]
    assert float(steps.max()) <= 0.5 + 1e-3  # rounded to the nearest
    assert_close(found(x), functional.linear(x, restored, linear.bias), limit=1e-5)
    assert found.bfloat16()(x.bfloat16()).dtype == torch.bfloat16
    assert found.weight.dtype == torch.int8
    empty = nn.Linear(4, 4, bias=False)
    nn.init.zeros_(empty.weight)
    assert not bool(Int8Linear(empty)(torch.randn(1, 4)).any())


def test_a_trunk_of_8_bits_from_a_file(tmp_path: Path) -> None:
    file = tiny_exo.write_parts(tmp_path)
    whole = Pipeline.from_files(file, device="cpu")
    small = Pipeline.from_files(file, device="cpu", trunk=TrunkOptions(dtype="int8"))
    layer = small.exo.trunk.language_model.layers[3]
    assert [type(part) for part in (layer.self_attn.k_proj, layer.mlp.down_proj)] == [Int8Linear] * 2
    assert layer.mlp.down_proj.weight.dtype == torch.int8
    assert isinstance(small.exo.trunk.visual.blocks[0].attn.qkv, nn.Linear)
    assert small.dtype == torch.float32
    expected, found = latents_of(whole), latents_of(small)
    difference = float((found - expected).abs().max()) / spread_of(expected)
    assert 0 < difference < 0.2  # as large as 8 bits make it on random weights, and no larger
    image = small.generate(["a"], [1], SETTINGS)[0]
    assert '"trunk_dtype": "int8"' in image.info["flowcore"]
    half = Pipeline.from_files(file, device="cpu", trunk=TrunkOptions(dtype="bfloat16"))
    assert half.exo.trunk.language_model.norm.weight.dtype == torch.bfloat16
    assert half.dtype == torch.float32
    assert not torch.equal(latents_of(half), expected)


def test_options_that_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tiny_exo.write_parts(tmp_path)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # as if it were not installed
    monkeypatch.setitem(sys.modules, "bitsandbytes.nn", None)
    for options, message in (
        (TrunkOptions(dtype="nf4"), "nf4 need the package bitsandbytes, got none; run: pip install bitsandb"),
        (TrunkOptions(dtype="int3"), "dtype must be auto or one of float32, .*got 'int3'"),
        (TrunkOptions(offload="disk"), "offload must be one of none, vision, layers, got 'disk'"),
        (
            TrunkOptions(offload="vision"),
            "offload must be none on the CPU, where everything lies, got vision",
        ),
    ):
        with pytest.raises(ConfigError, match=message) as caught:
            Pipeline.from_files(file, device="cpu", trunk=options)
        assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="must be none or vision with a trunk of nf4, got layers"):
        TrunkOptions(dtype="nf4", offload="layers").check(torch.device("cuda"))
    with pytest.raises(ConfigError, match="options of a trunk must go with an exo model, got xut"):
        Pipeline.from_files(tiny.write_parts(tmp_path), device="cpu", trunk=TrunkOptions())
    with pytest.raises(ConfigError, match="must be one of int8, nf4, got 'int2'"):
        quantize(random_exo().trunk, "int2")


@pytest.mark.parametrize("bits", [16, 8])
def test_streamed_layers_come_and_go(bits: int) -> None:
    """Every layer computes with a copy of its weights, and has its own back afterwards."""
    model = random_exo()
    if bits == 8:
        quantize(model.trunk, "int8")
    layers = decoder_layers(model.trunk)
    stream = streamed(layers, torch.device("cpu"))
    home = {id(t): t.data_ptr() for layer in layers for t in (*layer.parameters(), *layer.buffers())}
    seen: list[tuple[str, int]] = []

    def watched(kind: str, index: int, block: object, x: Tensor) -> object:
        def look(h: Tensor) -> object:
            if kind == "trunk":
                tensors = [*layers[index].parameters(), *layers[index].buffers()]
                assert all(t.data_ptr() != home[id(t)] for t in tensors)
            seen.append((kind, index))
            return block(h)

        return stream(kind, index, look, x)

    z, t = torch.randn(1, 16, 4, 4), torch.tensor([0.4])
    with torch.inference_mode():
        expected = model.step(z, t, model.encode(IDS, size=(4, 4)), iterations=2).velocity
        runtime = Runtime(run_block=watched)
        prefix = model.encode(IDS, size=(4, 4), runtime=runtime)
        found = model.step(z, t, prefix, iterations=2, runtime=runtime).velocity
    assert torch.equal(found, expected)
    assert seen.count(("trunk", 3)) == 3
    assert ("diffusion", 1) in seen
    assert {id(t): t.data_ptr() for layer in layers for t in (*layer.parameters(), *layer.buffers())} == home


def test_layers_come_home_after_a_fault() -> None:
    layers = decoder_layers(random_exo().trunk)
    home = [p.data_ptr() for p in layers[0].parameters()]

    def fail(_x: Tensor) -> Tensor:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        streamed(layers, torch.device("cpu"))("trunk", 0, fail, torch.zeros(1))
    assert [p.data_ptr() for p in layers[0].parameters()] == home


def test_a_part_is_brought_and_goes_back() -> None:
    class Part(nn.Linear):
        def to(self, device: object) -> "Part":
            moves.append(str(device))
            return self

    moves: list[str] = []
    with pytest.raises(ValueError, match="x"), brought(Part(2, 2), torch.device("cuda:3")):
        raise ValueError("x")
    assert moves == ["cuda:3", "cpu"]


@pytest.mark.parametrize(
    ("offload", "on_device"),
    [("none", {"visual", "layers", "rest"}), ("vision", {"layers", "rest"}), ("layers", {"rest"})],
)
def test_places_of_the_parts(offload: str, on_device: set[str]) -> None:
    """The device meta stands for an accelerator: what lies there has lost its values."""
    trunk = random_exo().trunk
    place(trunk, offload, torch.device("meta"))
    parts = {"visual": trunk.visual, "layers": trunk.language_model.layers, "rest": trunk.language_model.norm}
    found = {name for name, part in parts.items() if all(p.is_meta for p in part.parameters())}
    assert found == on_device
    check_offload(offload, torch.device("cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("offload", ["none", "vision", "layers"])
@pytest.mark.parametrize("dtype", ["auto", "int8"])
def test_offloaded_trunks_give_the_same_pictures(tmp_path: Path, offload: str, dtype: str) -> None:
    from tests.unit.exo.test_pipeline import picture

    file = tiny_exo.write_parts(tmp_path)
    options = TrunkOptions(dtype=dtype, offload=offload)
    made = Pipeline.from_files(file, device="cuda", dtype="float32", trunk=options)
    whole = Pipeline.from_files(file, device="cuda", dtype="float32", trunk=TrunkOptions(dtype=dtype))
    first, second = (one.generate(["a"], [1], SETTINGS, init_image=picture())[0] for one in (made, whole))
    assert first.tobytes() == second.tobytes()
