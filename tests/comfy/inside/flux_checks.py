"""Checks that Flux takes what ComfyUI's own Flux takes."""

import dataclasses
from collections.abc import Callable
from typing import Any

import comfy.latent_formats
import comfy.ldm.flux.model
import comfy.sd
import comfy.supported_models
import torch
from context import Context
from small import SIZE, conditioning, sample, warnings_of_comfyui
from torch import Tensor


def lora_files_of_diffusers_fit_flux(context: Context) -> None:
    model = context.model(architecture="flux")
    width = model.model.model_config.unet_config["hidden_size"]
    base = "transformer.transformer_blocks.0.attn.to_k"
    lora = {f"{base}.lora_A.weight": torch.ones(2, width), f"{base}.lora_B.weight": torch.ones(width, 2)}
    with warnings_of_comfyui() as warnings:
        changed, _ = comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0)
    assert not warnings
    ((key, _),) = changed.patches.items()
    assert key == "diffusion_model.double_blocks.0.img_attn.qkv.weight"


def stock_flux(ours: Any) -> Any:
    """ComfyUI's own Flux with the weights of ours."""
    sizes = dataclasses.asdict(ours.config) | {"in_channels": 16, "out_channels": 16, "patch_size": 2}
    sizes |= {"image_model": "flux", "axes_dim": list(ours.config.axes_dim)}
    del sizes["pooled_from_text"]
    if "txt_ids_dims" in {field.name for field in dataclasses.fields(comfy.ldm.flux.model.FluxParams)}:
        sizes["txt_ids_dims"] = []  # of newer versions, for FLUX.2
    config = comfy.supported_models.Flux(sizes)
    config.set_inference_dtype(torch.float32, None)
    stock = config.get_model({}, "")
    stock.diffusion_model.load_state_dict(ours.diffusion_model.state_dict(), strict=True)
    return stock


def flux_equals_the_stock_one_on_its_conditioning(context: Context) -> None:
    x, sigma = torch.randn(1, 16, 8, 12, generator=torch.Generator().manual_seed(5)), torch.full((1,), 0.6)
    added = torch.randn(1, 24, 48, generator=torch.Generator().manual_seed(6))
    control = {"input": [added, None], "output": [None, added]}
    ((states, entries),) = conditioning(1, 6)
    given = {**entries, "cross_attn": states, "noise": x, "device": x.device}
    results: dict[str, list[Tensor]] = {}
    own = context.model(architecture="flux").model
    for label, model in (("stock", stock_flux(own)), ("ours", own)):
        results[label] = []
        for more in ({}, {"guidance": 10.0}, {"control": control}, {"reference_latents": [x * 0.5]}):
            conditions = {**given, **{name: value for name, value in more.items() if name != "control"}}
            if label == "ours" and "reference_latents" in more:  # its latent space is another one
                conditions["reference_latents"] = [model.latent_format.spec.from_model(flux_space(x * 0.5))]
            conds = {name: cond.cond for name, cond in model.extra_conds(**conditions).items()}
            with torch.inference_mode():
                result = model.apply_model(
                    x, sigma, control=more.get("control"), transformer_options={}, **conds
                )
            results[label].append(result)
    for index, (stock, ours) in enumerate(zip(results["stock"], results["ours"], strict=True)):
        assert torch.allclose(stock, ours, atol=1e-4), (index, float((stock - ours).abs().max()))
    plain, *changed = results["ours"]
    assert all(not torch.allclose(result, plain, atol=1e-3) for result in changed), [
        float((result - plain).abs().max()) for result in changed
    ]


def flux_space(raw: Tensor) -> Tensor:
    """FLUX.1's model space of raw latents."""
    return comfy.latent_formats.Flux().process_in(raw)


def control_channels_reach_flux(context: Context) -> None:
    flux = context.part("flowcore.models.flux")
    checkpoint = context.part("flowcore.weights.checkpoint")
    path = context.models / "diffusion_models" / "fill.safetensors"
    config = dataclasses.replace(context.model(architecture="flux").model.config, in_channels=384)
    torch.manual_seed(0)
    checkpoint.save_model(path, flux.Flux(config).state_dict(), architecture="flux", config=config)
    model, _ = context.part("nodes.host.loading").load_model(path, "default")
    mask = torch.zeros(1, 1, 128, 96)
    results = []
    for value in (0.0, 1.0):
        picture = {"concat_latent_image": torch.full((1, 16, *SIZE), value), "concat_mask": mask + value}
        results.append(sample(model, conditioning(1, 5, **picture), conditioning(2, 5, **picture)))
    assert results[0].shape == (1, 16, *SIZE)
    assert not torch.allclose(*results, atol=1e-3)
    path.unlink()


def control_loras_widen_flux(context: Context) -> None:
    """A LoRA like FLUX.1's Canny and Depth, read by the stock loader and by the project's own."""
    lora_module, flux = context.part("flowcore.weights.lora"), context.part("flowcore.models.flux")
    shapes_of = context.part("flowcore.models.flux.lora").control_lora_shapes
    checkpoint = context.part("flowcore.weights.checkpoint")
    source = checkpoint.load_model(context.models / "diffusion_models" / "standin-flux.safetensors")
    wide = dataclasses.replace(source.config, in_channels=128)
    shapes = lora_module.layer_shapes(flux.Flux(wide, device="meta").state_dict())
    generator = torch.Generator().manual_seed(3)
    tensors = {
        name: torch.randn(shape, generator=generator) * 0.1 + name.endswith("scale")
        for name, shape in shapes_of(wide, shapes, 4).items()
    }
    state = dict(source.model.state_dict())
    lora = lora_module.parse_lora(tensors, {}, state, source.architecture, source="control")
    merged = {**state, **lora_module.merged_tensors(state, lora)}
    path = context.models / "diffusion_models" / "control.safetensors"
    checkpoint.save_model(path, merged, architecture="flux", config=wide, metadata=source.metadata)
    expected, _ = context.part("nodes.host.loading").load_model(path, "default")
    with warnings_of_comfyui() as warnings:
        found, _ = comfy.sd.load_lora_for_models(context.model(architecture="flux"), None, tensors, 1.0, 0)
    assert not warnings, warnings[:3]
    picture = {"concat_latent_image": torch.ones(1, 16, *SIZE)}
    results = [
        sample(model, conditioning(1, 5, **picture), conditioning(2, 5, **picture))
        for model in (expected, found)
    ]
    assert torch.allclose(*results, atol=1e-3), float((results[0] - results[1]).abs().max())
    path.unlink()


FLUX_CHECKS: tuple[Callable[[Context], None], ...] = (
    lora_files_of_diffusers_fit_flux,
    flux_equals_the_stock_one_on_its_conditioning,
    control_channels_reach_flux,
    control_loras_widen_flux,
)
