"""Every architecture with the stock nodes of one real ComfyUI server."""

import copy
import io
import math
import re
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from flowcore.pipeline import Pipeline
from flowcore.settings import Settings
from tests.comfy.listen_process import listening
from tests.comfy.server import Server
from tests.comfy.standins import CLIP, SMALL, SPEC, T5, T5GEMMA2, VAE, file_of, write_model
from tests.comfy.test_server import PREVIEW_EVENT, Prompt, custom_sampler, latent_of, node
from tests.support import CHAIN_LIMIT, assert_close

pytestmark = pytest.mark.comfy


@pytest.fixture(params=sorted(SMALL))
def architecture(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def own(prompt: Prompt, architecture: str) -> Prompt:
    """The bundled workflow on the stand-in of an architecture."""
    prompt["1"]["inputs"]["model_name"] = file_of(architecture)
    return prompt


def test_stock_samplers_agree(server: Server, own: Prompt) -> None:
    scheduler = node("BasicScheduler", model=["1", 0], scheduler="simple", steps=5, denoise=1.0)
    expected = latent_of(server, own)
    assert torch.equal(latent_of(server, custom_sampler(own, sigmas=scheduler)), expected)
    for kind, inputs in (
        ("ModelSamplingAuraFlow", {"shift": 5.0}),
        ("ModelSamplingFlux", {"max_shift": 1.15, "base_shift": 0.5, "width": 4096, "height": 4096}),
    ):
        own["60"] = node(kind, model=["1", 0], **inputs)
        own["7"]["inputs"]["model"] = ["60", 0]
        assert not torch.allclose(latent_of(server, own), expected, atol=1e-3), kind


def test_stock_nodes_change_the_latent(server: Server, own: Prompt, architecture: str) -> None:
    plain = latent_of(server, own)
    zeros = copy.deepcopy(own)
    zeros["50"] = node("ConditioningZeroOut", conditioning=["5", 0])
    zeros["7"]["inputs"]["negative"] = ["50", 0]
    assert torch.allclose(latent_of(server, zeros), plain, atol=1e-3) == (architecture != "flux")
    guided = copy.deepcopy(own)
    guided["51"] = node("FluxGuidance", conditioning=["4", 0], guidance=30.0)
    guided["7"]["inputs"]["positive"] = ["51", 0]
    assert torch.allclose(latent_of(server, guided), plain, atol=1e-3) == (architecture != "flux")


ENCODERS = {"flux": (T5, CLIP), "tinyflux": (T5, CLIP), "single_stream": (T5GEMMA2,)}
POOLED = 64
"""Width of the stand-in CLIP's vector."""
FITTING: dict[str, Any] = {
    "flux": replace(SMALL["flux"], vec_in_dim=POOLED, pooled_from_text=False),
    "tinyflux": replace(SMALL["tinyflux"], pooled_projection_dim=POOLED, pooled_from_text=False),
    "single_stream": SMALL["single_stream"],  # reads fewer tokens than its encoder pads to, on the left
}
"""Configurations for those encoders."""
SHIFTS = {"flux": math.exp(1.15), "tinyflux": 1 / 3, "single_stream": 1.0}
"""What lays out the noise levels of the stand-ins as the model's own sampling does."""


def model_path(base: Path, architecture: str) -> Path:
    return base / "models" / "diffusion_models" / f"encoded-{architecture}.safetensors"


@pytest.fixture
def encoded(base: Path, own: Prompt, architecture: str) -> Prompt:
    """The workflow with the text encoders that the architecture was made for; 4 steps, not square."""
    first, *second = ENCODERS[architecture]
    write_model(model_path(base, architecture), architecture=architecture, config=FITTING[architecture])
    own["1"]["inputs"]["model_name"] = model_path(base, architecture).name
    own["2"]["inputs"].update(
        clip_name=first, clip_name2=second[0] if second else "none", text_for=architecture
    )
    own["4"]["inputs"]["text"] = "a red bee"
    own["6"]["inputs"].update(width=96, height=144)
    own["7"]["inputs"]["steps"] = 4
    return own


def plain_pipeline(base: Path, architecture: str) -> Pipeline:
    """The same parts in plain Python."""
    models = base / "models"
    return Pipeline.from_files(
        model_path(base, architecture),
        vae=models / "vae" / VAE,
        text_encoder=[models / "text_encoders" / name for name in ENCODERS[architecture]],
        device="cpu",
        dtype="float32",
    )


def exact_levels(prompt: Prompt, architecture: str, denoise: float = 1.0) -> Prompt:
    """The prompt with levels that are computed, not picked from a table."""
    levels = {"shift_by": "value", "shift": SHIFTS[architecture], "denoise": denoise}
    return custom_sampler(prompt, sigmas=node("FlowCoreSigmas", steps=4, **levels))


def test_own_encoders_give_what_plain_python_gives(
    server: Server, base: Path, encoded: Prompt, architecture: str
) -> None:
    """Guided by CFG, and without guidance by BasicGuider, which is KSampler at cfg 1."""
    pipeline = plain_pipeline(base, architecture)
    for cfg in (2.0, 1.0):
        encoded["7"]["inputs"]["cfg"] = cfg
        prompt = exact_levels(encoded, architecture)
        if cfg == 1:
            prompt["22"] = node("BasicGuider", model=["1", 0], conditioning=["4", 0])
        settings = Settings(width=96, height=144, num_steps=4, cfg_scale=cfg, shift=SHIFTS[architecture])
        expected = pipeline.sample(["a red bee"], [0], settings)
        found = SPEC.to_model(latent_of(server, prompt))
        assert_close(found, expected, limit=CHAIN_LIMIT, what=f"cfg {cfg}")
        assert torch.allclose(latent_of(server, encoded), latent_of(server, prompt), atol=0.05)


def test_an_image_is_the_start_below_full_denoise(
    server: Server, base: Path, encoded: Prompt, architecture: str
) -> None:
    picture = Image.effect_noise((96, 144), 90).convert("RGB")
    picture.save(server.base / "input" / "start.png")
    encoded["40"] = node("LoadImage", image="start.png")
    encoded["41"] = node("VAEEncode", pixels=["40", 0], vae=["3", 0])
    encoded["7"]["inputs"].update(latent_image=["41", 0], denoise=0.5)
    pipeline = plain_pipeline(base, architecture)
    settings = Settings(width=96, height=144, num_steps=4, shift=SHIFTS[architecture], strength=0.5)
    clean = pipeline.encode_image(picture, settings)
    expected = pipeline.sample(["a red bee"], [0], settings, clean=clean)
    found = SPEC.to_model(latent_of(server, exact_levels(encoded, architecture, denoise=0.5)))
    assert_close(found, expected, limit=CHAIN_LIMIT)
    stock = SPEC.to_model(latent_of(server, encoded))
    full = copy.deepcopy(encoded)
    full["7"]["inputs"]["denoise"] = 1.0
    away = SPEC.to_model(latent_of(server, full))
    assert (stock - clean).abs().mean() < (away - clean).abs().mean()


def test_pictures_of_a_batch_are_their_own(server: Server, encoded: Prompt) -> None:
    """Two pictures that are not square, in 16 bits, through the VAE."""
    encoded["1"]["inputs"]["weight_dtype"] = "bfloat16"
    encoded["6"]["inputs"]["batch_size"] = 2
    first, second = (Image.open(io.BytesIO(data)) for data in server.images(server.run(encoded)))
    assert first.size == second.size == (96, 144)
    assert first.tobytes() != second.tobytes()
    assert len(first.convert("RGB").getcolors(1 << 20) or []) > 50


def test_a_noise_mask_keeps_the_rest(server: Server, own: Prompt) -> None:
    own["40"] = node("EmptyImage", width=128, height=128, batch_size=2, color=0x3060A0)
    own["41"] = node("VAEEncode", pixels=["40", 0], vae=["3", 0])
    own["43"] = node("SolidMask", value=1.0, width=64, height=128)
    own["44"] = node("SolidMask", value=0.0, width=128, height=128)
    own["45"] = node("MaskComposite", destination=["44", 0], source=["43", 0], x=64, y=0, operation="add")
    source = copy.deepcopy(own)
    source["7"] = node("LatentBatch", samples1=["41", 0], samples2=["41", 0])
    clean = latent_of(server, source)[:2]
    own["42"] = node("SetLatentNoiseMask", samples=["41", 0], mask=["45", 0])
    own["7"]["inputs"]["latent_image"] = ["42", 0]
    result = latent_of(server, own)
    assert torch.allclose(result[..., :7], clean[..., :7], atol=1e-4)
    assert float((result[..., 9:] - clean[..., 9:]).abs().mean()) > 0.1
    assert not torch.allclose(result[0, ..., 9:], result[1, ..., 9:], atol=0.1)


def steps_in(log: str) -> int:
    """The last step of 5000 that a log shows."""
    return int(re.findall(r"(\d+)/5000", log)[-1])


def test_previews_and_interrupt(server: Server, comfyui_python: Any, own: Prompt) -> None:
    own["7"]["inputs"]["seed"] = 1234
    with listening(comfyui_python, server, "flowcore-test") as messages:
        server.run(own)
    assert len([m for m in messages if m["type"] == "binary" and m["event"] == PREVIEW_EVENT]) >= 4
    own["7"]["inputs"].update(steps=5000, seed=99)
    before = len(server.log())
    prompt_id = server.queue(own)
    end = time.monotonic() + 60
    while "/5000" not in server.log()[before:] and time.monotonic() < end:
        time.sleep(0.1)
    server.post("/interrupt")
    entry = server.wait(prompt_id, 300)
    assert entry["status"]["status_str"] == "error"
    assert steps_in(server.log()[before:]) < 1000  # at once: a hundred steps are a second here
    own["7"]["inputs"].update(steps=5)
    server.run(own)
