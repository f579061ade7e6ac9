"""What is checked inside of ComfyUI's process, one function each; a check fails by raising."""

import gc
import weakref
from collections.abc import Callable
from typing import Any

import comfy.lora
import comfy.model_detection
import comfy.model_management as mm
import comfy.sample
import comfy.sd
import torch
from architecture_checks import ARCHITECTURE_CHECKS
from context import Context
from fake_gpu import BUDGETS
from flux_checks import FLUX_CHECKS
from gpu_checks import GPU_CHECKS
from sequence_checks import SEQUENCE_CHECKS
from text_checks import TEXT_CHECKS
from vae_checks import VAE_CHECKS


def every_linear_layer_takes_lora(context: Context) -> None:
    model = context.model()
    keys = comfy.lora.model_lora_keys_unet(model.model, {})
    layers = [
        name for name, layer in model.model.diffusion_model.named_modules() if hasattr(layer, "in_features")
    ]
    assert len(layers) > 20
    for name in layers:
        assert keys[f"diffusion_model.{name}"] == f"diffusion_model.{name}.weight"
        assert f"lora_unet_{name.replace('.', '_')}" in keys


def lora_is_the_same_under_every_budget(context: Context) -> None:
    latent, text = torch.zeros(1, 16, 16, 16), [[torch.ones(1, 3, 32), {}]]
    noise = comfy.sample.prepare_noise(latent, 0)
    results = {}
    for name, budget in BUDGETS.items():
        model, _ = comfy.sd.load_lora_for_models(context.model(), None, context.lora(), 1.0, 0.0)
        memory = 0 if name == "all" else max(1, int(model.model_size() * budget))
        with torch.inference_mode():
            model.patch_model(torch.device("cpu"), lowvram_model_memory=memory)
            results[name] = model.model.apply_model(
                noise, torch.ones(1), c_crossattn=text[0][0], transformer_options={}
            )
    assert torch.allclose(results["half"], results["all"], atol=1e-4)
    assert torch.allclose(results["none"], results["all"], atol=1e-4)
    plain = context.model().model.apply_model(
        noise, torch.ones(1), c_crossattn=text[0][0], transformer_options={}
    )
    assert not torch.allclose(results["all"], plain, atol=1e-2)


def vae_equals_plain_python(context: Context) -> None:
    plain = context.part("flowcore.vae.autoencoder").load_vae(
        context.models / "vae" / "standin-vae.safetensors"
    )
    vae = context.vae()
    pixels = torch.rand(2, 64, 72, 3, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        raw = vae.encode(pixels)
        expected = plain.spec.from_model(plain.encode(pixels.movedim(-1, 1) * 2 - 1))
        assert torch.allclose(raw, expected, atol=1e-4)
        decoded = vae.decode(raw)
        back = plain.decode(plain.spec.to_model(raw)).movedim(1, -1)
        assert torch.allclose(decoded, (back + 1) / 2, atol=1e-4)
        assert decoded.shape == pixels.shape
        assert vae.decode_tiled(raw, tile_x=8, tile_y=8, overlap=2).shape == pixels.shape


def text_of_different_lengths_is_not_repeated(context: Context) -> None:
    model = context.model()
    noise = torch.zeros(1, 16, 16, 16)
    with torch.inference_mode():
        short, long = (
            model.model.extra_conds(cross_attn=torch.zeros(1, n, 32), noise=noise, device="cpu")
            for n in (2, 6)
        )
    assert not short["c_crossattn"].can_concat(long["c_crossattn"])
    masked = torch.tensor([[1, 1, 0, 0]])
    conds = model.model.extra_conds(
        cross_attn=torch.zeros(1, 6, 32), attention_mask=masked, noise=noise, device="cpu"
    )
    assert conds["context_mask"].cond.tolist() == [[1, 1, 0, 0, 1, 1]]
    assert conds["context_mask"].cond.dtype == torch.long
    everything = model.model.extra_conds(
        cross_attn=torch.zeros(1, 4, 32), attention_mask=torch.ones(1, 4), noise=noise, device="cpu"
    )
    assert "context_mask" not in everything


def positions_survive_the_cast(context: Context) -> None:
    conds = context.part("nodes.host.xut_conds")
    positions = context.part("flowcore.models.xut.positions")
    config = context.model().model.model_config.unet_config["config"]
    for height, width in ((16, 16), (9, 15)):
        camera = {"zoom": 1.3, "x_shift": 0.4, "y_shift": -2.0}
        fixed = conds._fixed_point_map(height, width, tuple(camera.values()), 2)
        assert fixed.dtype == torch.int32
        expected = positions.camera_positions(height, width, patch_size=2, **camera)
        assert torch.allclose(conds._to_positions(fixed, 2), expected, atol=1e-6)
    assert config.patch_size == 2


def nodes_leave_their_inputs_alone(context: Context) -> None:
    nodes = context.part("nodes.conditioning")
    positive = [[torch.zeros(1, 2, 3), {"a": 1}]]
    negative = [[torch.zeros(1, 2, 3), {"b": 2}]]
    camera = nodes.XutCamera.execute(positive=positive, negative=negative, zoom=2.0, x_shift=0.0, y_shift=0.0)
    assert positive[0][1] == {"a": 1}
    assert negative[0][1] == {"b": 2}
    assert camera.args[0][0][1] == {"a": 1, "flowcore_camera": (2.0, 0.0, 0.0)}
    assert camera.args[1][0][1] == {"b": 2, "flowcore_camera": (2.0, 0.0, 0.0)}
    tread = nodes.XutTread.execute(
        positive=positive, negative=negative, positive_rate=0.1, negative_rate=0.3, seed=4
    )
    assert tread.args[0][0][1]["flowcore_tread"] == (0.1, 4)
    assert tread.args[1][0][1]["flowcore_tread"] == (0.3, 4)


def sigmas_are_exact(context: Context) -> None:
    node = context.part("nodes.sampling").Sigmas
    (grid,) = node.execute(steps=10, denoise=1.0, shift_by="value", shift=3.0).args
    expected = [1, 0.96429, 0.92308, 0.875, 0.81818, 0.75, 0.66667, 0.5625, 0.42857, 0.25, 0]
    assert torch.allclose(grid, torch.tensor(expected), atol=1e-5)
    (tail,) = node.execute(steps=4, denoise=0.5, shift_by="value", shift=1.0).args
    assert torch.allclose(tail, torch.tensor([0.5, 0.375, 0.25, 0.125, 0.0]))
    latent = {"samples": torch.zeros(1, 16, 128, 128)}
    (flux,) = node.execute(steps=4, denoise=1.0, shift_by="flux1", shift=1.0, latent_image=latent).args
    assert abs(float(flux[2]) - 0.7595) < 1e-3  # sigma 1/2 shifted by e^1.15
    assert node.execute(steps=4, denoise=0.0, shift_by="value", shift=1.0).args[0].shape == (0,)


def class_conditioned_models_sample(context: Context) -> None:
    xut = context.part("flowcore.models.xut")
    checkpoint = context.part("flowcore.weights.checkpoint")
    config = xut.XUTConfig(
        input_dim=4, dim=32, ctx_dim=None, heads=2, dim_head=16, mlp_dim=48, depth=1, class_cond=5
    )
    path = context.models / "diffusion_models" / "classes.safetensors"
    torch.manual_seed(0)
    network = xut.XUDiT(config)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    checkpoint.save_model(path, network.state_dict(), architecture="xut", config=config)
    model, info = context.part("nodes.host.loading").load_model(path, "default")
    assert "text states none" in info
    node = context.part("nodes.conditioning").XutClass
    results = [sample(model, *node.execute(class_id=number).args) for number in (1, 3)]
    assert not torch.allclose(*results)
    message = None
    try:
        sample(model, *node.execute(class_id=5).args)
    except ValueError as error:
        message = str(error)
    assert message == "class_id must be one of the model's 5 classes (0..4), got 5"
    path.unlink()


def token_dropping_repeats_by_its_seed(context: Context) -> None:
    xut = context.part("flowcore.models.xut")
    checkpoint = context.part("flowcore.weights.checkpoint")
    path = context.models / "diffusion_models" / "routed.safetensors"
    torch.manual_seed(0)
    config = xut.PRESETS["tiny"]
    network = xut.XUDiT(config)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    checkpoint.save_model(path, network.state_dict(), architecture="xut", config=config)
    model, _ = context.part("nodes.host.loading").load_model(path, "default")
    text = [[torch.ones(1, 3, config.ctx_dim), {}]]
    node = context.part("nodes.conditioning").XutTread
    rates = {"positive_rate": 0.1, "negative_rate": 0.5}
    first, second, other = (
        sample(model, *node.execute(positive=text, negative=text, seed=seed, **rates).args)
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, second)
    assert not torch.allclose(first, other)
    assert not torch.allclose(first, sample(model, text, text))
    path.unlink()


def sample(model: Any, positive: Any, negative: Any) -> torch.Tensor:
    """Two Euler steps by ComfyUI's own sampler."""
    latent = torch.zeros(1, 4, 16, 16)
    noise = comfy.sample.prepare_noise(latent, 0)
    with torch.inference_mode():
        return comfy.sample.sample(
            model, noise, 2, 3.0, "euler", "simple", positive, negative, latent, disable_pbar=True, seed=0
        )


def memory_factor_is_declared(context: Context) -> None:
    model = context.model().model
    small = model.memory_required([2, 16, 16, 16])
    assert model.memory_required([2, 16, 32, 32]) > 3 * small
    assert model.memory_required([2, 16, 16, 16], {"c_crossattn": [[2, 100, 32]]}) > small


def nothing_is_kept_after_use(context: Context) -> None:
    model = context.model()
    text = [[torch.ones(1, 3, 32), {}]]
    latent = torch.zeros(1, 16, 16, 16)
    with torch.inference_mode():
        comfy.sample.sample(
            model,
            comfy.sample.prepare_noise(latent, 0),
            2,
            3.0,
            "euler",
            "simple",
            text,
            text,
            latent,
            disable_pbar=True,
        )
    network = weakref.ref(model.model.diffusion_model)
    mm.unload_all_models()
    del model
    mm.cleanup_models()
    gc.collect()
    assert network() is None


def nothing_of_the_host_is_replaced(context: Context) -> None:
    assert comfy.model_detection.detect_unet_config is context.detect
    assert torch.nn.Linear is context.linear
    assert torch.nn.Linear.__module__ == "torch.nn.modules.linear"


CHECKS: tuple[Callable[[Context], None], ...] = (
    *GPU_CHECKS,
    *ARCHITECTURE_CHECKS,
    *FLUX_CHECKS,
    *SEQUENCE_CHECKS,
    *TEXT_CHECKS,
    *VAE_CHECKS,
    every_linear_layer_takes_lora,
    lora_is_the_same_under_every_budget,
    vae_equals_plain_python,
    text_of_different_lengths_is_not_repeated,
    positions_survive_the_cast,
    nodes_leave_their_inputs_alone,
    sigmas_are_exact,
    class_conditioned_models_sample,
    token_dropping_repeats_by_its_seed,
    memory_factor_is_declared,
    nothing_is_kept_after_use,
    nothing_of_the_host_is_replaced,
)
