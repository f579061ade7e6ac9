"""Every architecture with the stock nodes of one real ComfyUI server."""

import copy
import re
import time
from typing import Any

import pytest
import torch

from tests.comfy.listen_process import listening
from tests.comfy.server import Server
from tests.comfy.standins import SMALL, file_of
from tests.comfy.test_server import PREVIEW_EVENT, Prompt, custom_sampler, latent_of, node

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
    lora = copy.deepcopy(own)
    lora["30"] = node(
        "LoraLoaderModelOnly", model=["1", 0], lora_name=file_of(architecture), strength_model=1.0
    )
    lora["7"]["inputs"]["model"] = ["30", 0]
    before = len(server.log())
    assert not torch.allclose(latent_of(server, lora), plain, atol=1e-3)
    assert "lora key not loaded" not in server.log()[before:]
    zeros = copy.deepcopy(own)
    zeros["50"] = node("ConditioningZeroOut", conditioning=["5", 0])
    zeros["7"]["inputs"]["negative"] = ["50", 0]
    assert torch.allclose(latent_of(server, zeros), plain, atol=1e-3) == (architecture != "flux")
    guided = copy.deepcopy(own)
    guided["51"] = node("FluxGuidance", conditioning=["4", 0], guidance=30.0)
    guided["7"]["inputs"]["positive"] = ["51", 0]
    assert torch.allclose(latent_of(server, guided), plain, atol=1e-3) == (architecture != "flux")


def test_a_noise_mask_keeps_the_rest(server: Server, own: Prompt) -> None:
    own["40"] = node("EmptyImage", width=128, height=128, batch_size=1, color=0x3060A0)
    own["41"] = node("VAEEncode", pixels=["40", 0], vae=["3", 0])
    own["43"] = node("SolidMask", value=1.0, width=64, height=128)
    own["44"] = node("SolidMask", value=0.0, width=128, height=128)
    own["45"] = node("MaskComposite", destination=["44", 0], source=["43", 0], x=64, y=0, operation="add")
    source = copy.deepcopy(own)
    source["7"] = node("LatentBatch", samples1=["41", 0], samples2=["41", 0])
    encoded = latent_of(server, source)[:1]
    own["42"] = node("SetLatentNoiseMask", samples=["41", 0], mask=["45", 0])
    own["7"]["inputs"]["latent_image"] = ["42", 0]
    result = latent_of(server, own)
    assert torch.allclose(result[..., :7], encoded[..., :7], atol=1e-4)
    assert float((result[..., 9:] - encoded[..., 9:]).abs().mean()) > 0.1


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
