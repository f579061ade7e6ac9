"""What one real ComfyUI server shows: nodes, stock samplers, LoRA, masks, previews, interrupt, saving."""

import copy
import io
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tests.comfy.listen_process import listening
from tests.comfy.server import LINK_NAME, Server, ServerError
from tests.comfy.standins import LORA, MODEL, SPEC, TEXT, VAE
from tests.comfy.workflows import demo_architectures, text_to_image

pytestmark = pytest.mark.comfy
PREVIEW_EVENT = 1
Prompt = dict[str, Any]


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    """A node in API form; links are lists of a node's number and an output's."""
    return {"class_type": kind, "inputs": inputs}


def with_latent(prompt: Prompt) -> Prompt:
    """The prompt with its latent saved in place of a picture."""
    changed = copy.deepcopy(prompt)
    del changed["8"], changed["9"]
    changed["9"] = node("SaveLatent", samples=["7", 0], filename_prefix="latents/t")
    return changed


def latent_of(server: Server, prompt: Prompt) -> torch.Tensor:
    """The raw latent `b c h w` that a prompt's sampler makes."""
    entry = server.run(with_latent(prompt))
    file = entry["outputs"]["9"]["latents"][0]
    tensor = load_file(server.base / "output" / file["subfolder"] / file["filename"])["latent_tensor"]
    assert torch.isfinite(tensor).all()
    return tensor.float()


def picture_of(server: Server, prompt: Prompt) -> bytes:
    return Image.open(io.BytesIO(server.images(server.run(prompt))[0])).convert("RGB").tobytes()


@pytest.fixture(scope="module")
def object_info(server: Server) -> dict[str, Any]:
    return {name: entry for name, entry in server.get("/object_info").items() if name.startswith("FlowCore")}


def test_every_node_is_described(object_info: dict[str, Any]) -> None:
    assert len(object_info) >= 13
    for name, entry in object_info.items():
        assert entry["display_name"], name
        assert entry["description"].endswith("."), name
        assert entry["category"].startswith("FlowCore/"), name
        assert all(entry["output_tooltips"]), name
        inputs = {**entry["input"].get("required", {}), **entry["input"].get("optional", {})}
        assert inputs, name
        for label, (kind, options) in inputs.items():
            assert options["tooltip"].endswith("."), f"{name}.{label}"
            if kind in ("INT", "FLOAT"):
                assert {"default", "min", "max"} <= set(options), f"{name}.{label}"
        assert len(set(entry["output_name"])) == len(entry["output_name"]), name


def test_every_node_has_a_help_page(server: Server, object_info: dict[str, Any]) -> None:
    for name in object_info:
        page = server.get_bytes(f"/extensions/{LINK_NAME}/docs/{name}.md").decode()
        assert page.startswith("# "), name


def test_bundled_files_come_first_in_the_loaders(object_info: dict[str, Any]) -> None:
    from flowcore.assets import list_builtin

    for loader, label, own in (
        ("Model", "model_name", MODEL),
        ("TextEncoder", "clip_name", TEXT),
        ("VAE", "vae_name", VAE),
    ):
        kind, options = object_info[f"FlowCoreLoad{loader}"]["input"]["required"][label]
        names = options["options"] if kind == "COMBO" else kind
        bundled = [name for name in names if name.startswith("flowcore-")]
        assert names[: len(bundled)] == bundled
        assert own in names
        assert not any(name.startswith("flowcore-exo") for name in names)
    assert all(not name.startswith("flowcore-") for name in list_builtin())


def test_the_workflow_makes_a_picture(server: Server, prompt: Prompt) -> None:
    image = Image.open(io.BytesIO(server.images(server.run(prompt))[0]))
    assert image.size == (128, 128)
    assert len(image.convert("RGB").getcolors(1 << 20) or []) > 50


def custom_sampler(prompt: Prompt, *, sigmas: dict[str, Any]) -> Prompt:
    """The prompt with SamplerCustomAdvanced in the place of KSampler."""
    changed = copy.deepcopy(prompt)
    settings = changed["7"]["inputs"]
    guider = {key: settings[key] for key in ("model", "positive", "negative", "cfg")}
    changed["20"] = node("KSamplerSelect", sampler_name=settings["sampler_name"])
    changed["21"] = sigmas
    changed["22"] = node("CFGGuider", **guider)
    changed["23"] = node("RandomNoise", noise_seed=settings["seed"])
    links = {"noise": ["23", 0], "guider": ["22", 0], "sampler": ["20", 0], "sigmas": ["21", 0]}
    changed["7"] = node("SamplerCustomAdvanced", **links, latent_image=settings["latent_image"])
    return changed


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m", "heun"])
def test_ksampler_equals_custom_sampler(server: Server, prompt: Prompt, sampler: str) -> None:
    prompt["7"]["inputs"]["sampler_name"] = sampler
    scheduler = node("BasicScheduler", model=["1", 0], scheduler="simple", steps=5, denoise=1.0)
    expected = latent_of(server, prompt)
    assert torch.equal(latent_of(server, custom_sampler(prompt, sigmas=scheduler)), expected)
    own = node("FlowCoreSigmas", steps=5, denoise=1.0, shift_by="value", shift=1.0)
    assert torch.allclose(latent_of(server, custom_sampler(prompt, sigmas=own)), expected, atol=2e-5)


def plain_pipeline(base: Path) -> Any:
    """The stand-ins in plain Python."""
    from flowcore.pipeline import Pipeline

    models = base / "models"
    return Pipeline.from_files(
        models / "diffusion_models" / MODEL,
        vae=models / "vae" / VAE,
        text_encoder=models / "text_encoders" / TEXT,
        device="cpu",
        dtype="float32",
    )


def test_latents_equal_those_of_plain_python(server: Server, base: Path, prompt: Prompt) -> None:
    from flowcore.settings import Settings

    pipeline = plain_pipeline(base)
    text = prompt["4"]["inputs"]["text"]
    for seed, cfg in ((0, 2.0), (7, 1.0)):
        prompt["7"]["inputs"].update(seed=seed, cfg=cfg)
        settings = Settings(width=128, height=128, num_steps=5, cfg_scale=cfg)
        expected = pipeline.sample([text], [seed], settings)
        found = SPEC.to_model(latent_of(server, prompt))
        assert float((found - expected).abs().max()) < 1e-4


@pytest.mark.parametrize("architecture", demo_architectures())
def test_bundled_demos_equal_plain_python(server: Server, architecture: str) -> None:
    from flowcore.pipeline import Pipeline
    from flowcore.settings import Settings

    prompt = text_to_image(architecture).prompt
    prompt["7"]["inputs"]["steps"] = 5
    pipeline = Pipeline.from_files(f"{architecture}-demo", device="cpu", dtype="float32")
    settings = Settings(width=128, height=128, num_steps=5, cfg_scale=2.0)
    expected = pipeline.sample([prompt["4"]["inputs"]["text"]], [0], settings)
    found = pipeline.vae.spec.to_model(latent_of(server, prompt))
    assert float((found - expected).abs().max()) < 1e-4


def test_a_lora_changes_the_picture_and_every_key_is_used(server: Server, prompt: Prompt) -> None:
    plain = picture_of(server, prompt)
    prompt["30"] = node("LoraLoaderModelOnly", model=["1", 0], lora_name=LORA, strength_model=1.0)
    prompt["7"]["inputs"]["model"] = ["30", 0]
    before = len(server.log())
    assert picture_of(server, prompt) != plain
    assert "lora key not loaded" not in server.log()[before:]
    prompt["30"]["inputs"]["strength_model"] = 0.0
    assert picture_of(server, prompt) == plain


def test_a_noise_mask_keeps_the_rest(server: Server, prompt: Prompt) -> None:
    image = Image.effect_noise((128, 128), 80).convert("RGBA")
    image.putalpha(Image.new("L", (128, 128), 255))
    image.paste((0, 0, 0, 0), (64, 0, 128, 128))  # transparent = where LoadImage's mask is 1
    image.save(server.base / "input" / "masked.png")
    prompt["40"] = node("LoadImage", image="masked.png")
    prompt["41"] = node("VAEEncode", pixels=["40", 0], vae=["3", 0])
    source = copy.deepcopy(prompt)
    source["7"] = node("LatentBatch", samples1=["41", 0], samples2=["41", 0])
    encoded = latent_of(server, source)[:1]
    prompt["42"] = node("SetLatentNoiseMask", samples=["41", 0], mask=["40", 1])
    prompt["7"]["inputs"]["latent_image"] = ["42", 0]
    result = latent_of(server, prompt)
    assert torch.allclose(result[..., :7], encoded[..., :7], atol=1e-4)
    assert float((result[..., 9:] - encoded[..., 9:]).abs().mean()) > 0.1


def test_previews_arrive(server: Server, comfyui_python: Path, prompt: Prompt) -> None:
    prompt["7"]["inputs"]["seed"] = 1234
    with listening(comfyui_python, server, "flowcore-test") as messages:
        server.run(prompt)
    previews = [m for m in messages if m["type"] == "binary" and m["event"] == PREVIEW_EVENT]
    assert len(previews) >= 4
    steps = [m["data"]["value"] for m in messages if m["type"] == "progress"]
    assert steps[-1] == 5


def test_an_interrupt_takes_less_than_three_seconds(server: Server, prompt: Prompt) -> None:
    prompt["7"]["inputs"].update(steps=5000, seed=99)
    before = len(server.log())
    prompt_id = server.queue(prompt)
    end = time.monotonic() + 60
    while "/5000" not in server.log()[before:] and time.monotonic() < end:
        time.sleep(0.1)
    start = time.monotonic()
    server.post("/interrupt")
    entry = server.wait(prompt_id, 30)
    assert time.monotonic() - start < 3
    assert entry["status"]["status_str"] == "error"
    prompt["7"]["inputs"].update(steps=5)
    server.run(prompt)


@pytest.mark.parametrize(
    ("kind", "inputs"),
    [
        ("FlowCoreGuidanceCFGZero", {"zero_init_steps": 1}),
        ("FlowCoreGuidanceAPG", {"parallel": 0.0, "norm_limit": 15.0, "momentum": -0.5}),
        ("FlowCoreGuidanceRescale", {"amount": 0.7}),
        ("FlowCoreGuidanceInterval", {"highest_sigma": 0.7, "lowest_sigma": 0.3}),
    ],
)
def test_guidance_nodes_change_the_result_and_repeat_it(
    server: Server, prompt: Prompt, kind: str, inputs: dict[str, Any]
) -> None:
    plain = latent_of(server, prompt)
    prompt["50"] = node(kind, model=["1", 0], **inputs)
    prompt["7"]["inputs"]["model"] = ["50", 0]
    first = latent_of(server, prompt)
    assert not torch.allclose(first, plain, atol=1e-3)
    prompt["7"]["inputs"]["seed"] = 5  # another run in between: rules with a memory must start fresh
    latent_of(server, prompt)
    prompt["7"]["inputs"]["seed"] = 0
    prompt["9"]["inputs"]["filename_prefix"] = "again"
    assert torch.equal(latent_of(server, prompt), first)


def test_guidance_equals_plain_python(server: Server, base: Path, prompt: Prompt) -> None:
    from flowcore.settings import Settings

    pipeline = plain_pipeline(base)
    prompt["50"] = node("FlowCoreGuidanceCFGZero", model=["1", 0], zero_init_steps=1)
    prompt["51"] = node("FlowCoreGuidanceInterval", model=["50", 0], highest_sigma=0.7, lowest_sigma=0.3)
    prompt["7"]["inputs"]["model"] = ["51", 0]
    settings = Settings(
        width=128, height=128, num_steps=5, cfg_scale=2.0, cfg_zero=True, cfg_interval=(0.3, 0.7)
    )
    expected = pipeline.sample([prompt["4"]["inputs"]["text"]], [0], settings)
    assert float((SPEC.to_model(latent_of(server, prompt)) - expected).abs().max()) < 1e-4


def test_stock_patches_and_odd_sizes_work(server: Server, prompt: Prompt) -> None:
    prompt["6"]["inputs"].update(width=120, height=72, batch_size=2)
    patches = {
        "60": ("ModelSamplingSD3", {"shift": 3.0}),
        "61": (
            "SkipLayerGuidanceDiT",
            {
                "double_layers": "0",
                "single_layers": "1",
                "scale": 2.0,
                "start_percent": 0.0,
                "end_percent": 1.0,
                "rescaling_scale": 0.0,
            },
        ),
        "62": (
            "EasyCache",
            {"reuse_threshold": 0.2, "start_percent": 0.1, "end_percent": 0.9, "verbose": False},
        ),
    }
    source = ["1", 0]
    for number, (kind, inputs) in patches.items():
        prompt[number] = node(kind, model=source, **inputs)
        source = [number, 0]
    prompt["7"]["inputs"]["model"] = source
    assert latent_of(server, prompt).shape == (2, 16, 9, 15)


def test_shift_nodes_of_three_multipliers_agree(server: Server, prompt: Prompt) -> None:
    found = []
    for kind in ("ModelSamplingSD3", "ModelSamplingAuraFlow"):
        prompt["60"] = node(kind, model=["1", 0], shift=3.0)
        prompt["7"]["inputs"]["model"] = ["60", 0]
        found.append(latent_of(server, prompt))
    assert torch.allclose(found[0], found[1], atol=1e-5)
    prompt["7"]["inputs"]["model"] = ["1", 0]
    assert not torch.allclose(latent_of(server, prompt), found[0], atol=1e-3)


def test_camera_and_area_conditioning_run(server: Server, prompt: Prompt) -> None:
    plain = latent_of(server, prompt)
    camera = {"zoom": 1.5, "x_shift": 0.2, "y_shift": -0.1}
    prompt["70"] = node("FlowCoreXutCamera", positive=["4", 0], negative=["5", 0], **camera)
    prompt["7"]["inputs"].update(positive=["70", 0], negative=["70", 1])
    moved = latent_of(server, prompt)
    assert not torch.allclose(moved, plain, atol=1e-3)
    area = {"width": 64, "height": 128, "x": 64, "y": 0, "strength": 1.0}
    prompt["71"] = node("ConditioningSetArea", conditioning=["4", 0], **area)
    prompt["72"] = node("ConditioningCombine", conditioning_1=["4", 0], conditioning_2=["71", 0])
    prompt["7"]["inputs"].update(positive=["72", 0], negative=["5", 0])
    assert not torch.allclose(latent_of(server, prompt), plain, atol=1e-3)


def test_a_node_for_another_model_says_so(server: Server, prompt: Prompt) -> None:
    rates = {"positive_rate": 0.0, "negative_rate": 0.25, "seed": 0}
    prompt["70"] = node("FlowCoreXutTread", positive=["4", 0], negative=["5", 0], **rates)
    prompt["7"]["inputs"].update(positive=["70", 0], negative=["70", 1])
    with pytest.raises(ServerError, match=r"trained with token routing, got one without; remove the node$"):
        server.run(prompt)


def test_a_saved_model_loads_again_and_is_the_same(server: Server, prompt: Prompt) -> None:
    expected = latent_of(server, prompt)
    saving = {
        "1": prompt["1"],
        "2": node("ModelSave", model=["1", 0], filename_prefix="resaved"),
    }
    server.run(saving)
    (written,) = (server.base / "output").glob("resaved*.safetensors")
    target = server.base / "models" / "diffusion_models" / "resaved.safetensors"
    written.rename(target)
    prompt["1"]["inputs"]["model_name"] = target.name
    assert torch.equal(latent_of(server, prompt), expected)
    target.unlink()


def test_fp8_and_half_precision_weights_run(server: Server, prompt: Prompt) -> None:
    exact = latent_of(server, prompt)
    for name, limit in (("bfloat16", 0.1), ("float16", 0.05), ("fp8_e4m3fn", 0.6)):
        prompt["1"]["inputs"]["weight_dtype"] = name
        error = (latent_of(server, prompt) - exact).std() / exact.std()
        assert 0 < float(error) < limit, name


def test_a_file_of_the_users_wins_over_a_bundled_one(server: Server, prompt: Prompt) -> None:
    expected = latent_of(server, prompt)
    folder = server.base / "models" / "diffusion_models"
    own = folder / "flowcore-xut-demo.safetensors"
    own.write_bytes((folder / MODEL).read_bytes())
    prompt["1"]["inputs"]["model_name"] = own.name
    assert torch.equal(latent_of(server, prompt), expected)
    own.unlink()


def test_a_replaced_file_is_loaded_anew_and_a_loaded_one_is_not_touched(
    server: Server, prompt: Prompt
) -> None:
    from tests.comfy.standins import write_model

    path = server.base / "models" / "diffusion_models" / "changing.safetensors"
    write_model(path, seed=11)
    prompt["1"]["inputs"]["model_name"] = path.name
    first = latent_of(server, prompt)
    half = path.read_bytes()[: path.stat().st_size // 2]
    path.write_bytes(half)  # in place, under a loaded model
    with pytest.raises(ServerError, match=r"changing\.safetensors must be a complete safetensors file"):
        latent_of(server, prompt)
    write_model(path, seed=12)
    assert not torch.allclose(latent_of(server, prompt), first, atol=1e-3)
