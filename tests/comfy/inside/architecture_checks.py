"""Checks that hold for every architecture, on stand-ins with random weights."""

from collections.abc import Callable
from typing import Any

import comfy.sample
import comfy.sd
import comfy.utils
import comfy_extras.nodes_model_advanced as advanced
import torch
from context import Context
from fake_gpu import BUDGETS, GPU, on_fake_gpu, where
from small import SIZE, WIDTH, conditioning, sample, warnings_of_comfyui
from torch import Tensor

SMALL = ("flux", "tinyflux", "single_stream")


def plain_latents(context: Context, name: str, positive: Any, negative: Any, **extras: Tensor) -> Tensor:
    """The same in plain Python, in model space."""
    loaded = context.part("flowcore.weights.checkpoint").load_model(
        context.models / "diffusion_models" / f"standin-{name}.safetensors"
    )
    kind = context.part("flowcore.conditioning").Conditioning
    parts = [
        kind(
            context=states,
            pooled=None if name == "single_stream" else entries["pooled_output"],
            extras=extras,
        )
        for ((states, entries),) in (positive, negative)
    ]

    def velocity(x: Tensor, sigma: Tensor) -> Tensor:
        row = loaded.architecture
        yes, no = (row.velocity(loaded.model.forward, x, sigma, part) for part in parts)
        return no + 3.0 * (yes - no)

    noise = comfy.sample.prepare_noise(torch.zeros(1, 16, *SIZE), 0)
    grid = context.part("flowcore.flow.schedule").sigma_grid(4)
    with torch.inference_mode():
        return context.part("flowcore.flow.solvers").SOLVERS["euler"](velocity, noise, grid)


def architectures_equal_plain_python(context: Context) -> None:
    positive, negative = conditioning(1, 7, guidance=2.5), conditioning(2, 4, guidance=2.5)
    for name in SMALL:
        model = context.model(architecture=name)
        extras = {"guidance": torch.tensor([2.5])} if name == "flux" else {}
        expected = plain_latents(context, name, positive, negative, **extras)
        found = model.get_model_object("latent_format").spec.to_model(sample(model, positive, negative))
        assert torch.isfinite(found).all(), name
        assert float((found - expected).abs().max()) < 1e-4, (name, float((found - expected).abs().max()))


def odd_sizes_are_padded_and_cropped(context: Context) -> None:
    for name in SMALL:
        model = context.model(architecture=name)
        result = sample(model, conditioning(1, 3), conditioning(2, 3), size=(9, 13))
        assert result.shape == (1, 16, 9, 13), name


def an_empty_negative_prompt_is_what_training_dropped(context: Context) -> None:
    positive, written = conditioning(1, 5), conditioning(2, 5)
    marked = conditioning(2, 5, flowcore_empty=5)
    zeros = [[torch.zeros(1, 5, WIDTH), {"pooled_output": torch.zeros(1, WIDTH)}]]
    for name, is_zero in (("flux", False), ("tinyflux", True), ("single_stream", True)):
        model = context.model(architecture=name)
        expected = sample(model, positive, zeros if is_zero else written)
        other = sample(model, positive, written if is_zero else zeros)
        found = sample(model, positive, marked)
        assert torch.equal(found, expected), name
        assert not torch.allclose(found, other, atol=1e-3), name
        joined = sample(model, positive, conditioning(2, 5, flowcore_empty=2))
        assert torch.equal(joined, sample(model, positive, written)), name
        # An empty positive prompt is text like any other.
        assert torch.equal(sample(model, marked, zeros), sample(model, written, zeros)), name


def levels_are_laid_out_as_each_model_wants(context: Context) -> None:
    def middle(model: Any) -> float:
        return float(model.get_model_object("model_sampling").sigma(torch.tensor(0.5)))

    expected = {"xut": 0.5, "flux": 0.7595, "tinyflux": 0.25, "single_stream": 0.5}
    for name, level in expected.items():
        model = context.model(architecture=name)
        assert abs(middle(model) - level) < 1e-4, (name, middle(model))
        (even,) = advanced.ModelSamplingAuraFlow().patch_aura(model, 1.0)
        (curved,) = advanced.ModelSamplingFlux().patch(model, 1.15, 0.5, 1024, 1024)
        assert abs(middle(even) - 0.5) < 1e-4, name
        assert abs(middle(curved) - 0.7595) < 1e-3, name


def files_may_state_their_shift(context: Context) -> None:
    checkpoint = context.part("flowcore.weights.checkpoint")
    load = context.part("nodes.host.loading").load_model
    loaded = checkpoint.load_model(context.models / "diffusion_models" / "standin-tinyflux.safetensors")
    path = context.models / "diffusion_models" / "shifted.safetensors"
    for text, level in (("1.0", 0.5), ("3.0", 0.75), ("-1", None), ("many", None)):
        checkpoint.save_model(
            path,
            loaded.model.state_dict(),
            architecture="tinyflux",
            config=loaded.config,
            metadata={**loaded.metadata, "flowcore.shift": text},
        )
        message = ""
        try:
            model, _ = load(path, "default")
            assert abs(float(model.model.model_sampling.sigma(torch.tensor(0.5))) - level) < 1e-6
            comfy.utils.save_torch_file(model.model.state_dict_for_saving(), str(path))
            again, _ = load(path, "default")
            assert again.model.model_config.shift == float(text)
        except ValueError as error:
            message = str(error)
        expected = f"flowcore.shift in {path.name} must be a positive number, got {text!r}"
        assert message == ("" if level else expected), message
    path.unlink()


def every_lora_key_is_used(context: Context) -> None:
    for name in SMALL:
        lora = context.lora(name)
        kohya = {
            key.replace(".", "_", key.count(".") - 2)
            .replace("diffusion_model_", "lora_unet_")
            .replace("lora_A", "lora_down")
            .replace("lora_B", "lora_up"): tensor
            for key, tensor in lora.items()
            if ".lora_" in key
        }
        for tensors in (lora, kohya):
            with warnings_of_comfyui() as warnings:
                model, _ = comfy.sd.load_lora_for_models(
                    context.model(architecture=name), None, tensors, 1.0, 0
                )
            targets = {key.split(".lora_")[0].removesuffix(".diff") for key in tensors}
            assert not warnings, (name, warnings[:3])
            assert len(model.patches) == len(targets), name


def lora_acts_the_same_under_every_budget(context: Context) -> None:
    text, latent = conditioning(1, 5)[0][0], torch.zeros(1, 16, *SIZE)
    noise = comfy.sample.prepare_noise(latent, 0)
    for name in SMALL:
        results = {}
        for budget in BUDGETS:
            model = context.model(architecture=name)
            model, _ = comfy.sd.load_lora_for_models(model, None, context.lora(name), 1.0, 0.0)
            memory = {"all": 0, "half": model.model_size() // 2, "none": 1}[budget]
            with torch.inference_mode():
                model.patch_model(torch.device("cpu"), lowvram_model_memory=memory)
                results[budget] = model.model.apply_model(
                    noise,
                    torch.full((1,), 0.7),
                    c_crossattn=text,
                    y=text.mean(1),
                    guidance=torch.ones(1),
                    transformer_options={},
                )
        for budget in ("half", "none"):
            assert torch.allclose(results[budget], results["all"], atol=1e-4), (name, budget)


def blocks_can_be_replaced(context: Context) -> None:
    positive, negative = conditioning(1, 5), conditioning(2, 5)
    for name in SMALL:
        model = context.model(architecture=name)
        plain = sample(model, positive, negative)
        for kind in ("double_block", "single_block"):
            if kind not in model.model.host.stock_kinds.values():
                continue
            copies = [model.clone(), model.clone()]
            copies[0].set_model_patch_replace(lambda args, _: args, "dit", kind, 0)
            copies[1].set_model_patch_replace(lambda args, more: more["original_block"](args), "dit", kind, 0)
            skipped, same = (sample(copy, positive, negative) for copy in copies)
            assert not torch.allclose(skipped, plain, atol=1e-3), (name, kind)
            assert torch.allclose(same, plain, atol=1e-6), (name, kind)


def attention_can_be_replaced(context: Context) -> None:
    for name in SMALL:
        model = context.model(architecture=name).clone()
        calls = []

        def override(
            function: Callable[..., Tensor], *args: Any, calls: Any = calls, **kwargs: Any
        ) -> Tensor:
            calls.append(args[0].shape)
            return function(*args, **kwargs)

        model.model_options["transformer_options"]["optimized_attention_override"] = override
        sample(model, conditioning(1, 5), conditioning(2, 5))
        assert len(calls) >= 8, (name, len(calls))


def weights_that_need_float32_keep_it(context: Context) -> None:
    for dtype in ("fp8_e4m3fn", "bfloat16"):
        network = context.model(dtype, "single_stream").model.diffusion_model
        filters = {key: t.dtype for key, t in network.state_dict().items() if "fourier_filter" in key}
        assert filters
        assert set(filters.values()) == {torch.float32}, filters
        stored = {tensor.dtype for tensor in network.state_dict().values()}
        assert getattr(torch, dtype.replace("fp8", "float8")) in stored
    frequencies = context.model("bfloat16", "tinyflux").model.diffusion_model.rope.freqs_1
    assert frequencies.dtype == torch.float32


def low_precision_stays_near(context: Context) -> None:
    positive, negative = conditioning(1, 5), conditioning(2, 5)
    for name in SMALL:
        exact = sample(context.model(architecture=name), positive, negative)
        assert torch.equal(sample(context.model("float32", name), positive, negative), exact), name
        for dtype, limit in (("float16", 0.02), ("bfloat16", 0.1), ("fp8_e4m3fn", 0.6)):
            found = sample(context.model(dtype, name), positive, negative)
            error = float((found - exact).std() / exact.std())
            assert 0 < error < limit, (name, dtype, error)


def long_prompts_are_cut_as_in_plain_python(context: Context) -> None:
    ((states, entries),) = conditioning(1, 40)
    for name in ("xut", "single_stream"):
        model = context.model(architecture=name)
        length = model.model.text_shape.length
        assert length < 40
        with warnings_of_comfyui() as warnings:
            found = sample(model, [[states, entries]], conditioning(2, 4))
        assert f"a prompt of 40 tokens was cut to the {length} that the model reads" in warnings
        assert torch.equal(found, sample(model, [[states[:, :length], entries]], conditioning(2, 4))), name


def conditions_of_other_models_are_named(context: Context) -> None:
    wide = [[torch.zeros(1, 4, 48), {"pooled_output": torch.zeros(1, WIDTH)}]]
    pooled = [[torch.zeros(1, 4, WIDTH), {"pooled_output": torch.zeros(1, 48)}]]
    references = conditioning(1, 4, reference_latents=[torch.zeros(1, 16, 4, 4)] * 2)
    for name, wrong, expected in (
        ("flux", wide, "text states for this model must be 32 wide, got 48"),
        ("tinyflux", pooled, "the pooled vector for this model must be 32 wide, got 48"),
        ("flux", references, "reference pictures must be at most one, got 2"),
    ):
        message = ""
        try:
            sample(context.model(architecture=name), wrong, conditioning(2, 4))
        except ValueError as error:
            message = str(error)
        assert message.startswith(expected), (name, message)
        assert "\n" not in message


def architectures_on_fake_gpu(context: Context) -> None:
    for name in SMALL:
        for dtype in ("bfloat16", "fp8_e4m3fn"):
            for budget in BUDGETS.values():
                model = context.model(dtype, name)
                if dtype == "bfloat16":
                    model.model.manual_cast_dtype = None  # as on a GPU that computes in it
                    model, _ = comfy.sd.load_lora_for_models(model, None, context.lora(name), 1.0, 0.0)
                _call_on_fake_gpu(model, budget)


def _call_on_fake_gpu(model: Any, budget: float) -> None:
    with on_fake_gpu(model, budget):
        x, sigma = torch.zeros(2, 16, *SIZE, device=GPU), torch.ones(2, device=GPU)
        conds = {
            "c_crossattn": torch.zeros(2, 7, WIDTH, device=GPU),
            "context_mask": torch.ones(2, 7, dtype=torch.long, device=GPU),
            "y": torch.zeros(2, WIDTH, device=GPU),
            "guidance": torch.ones(2, device=GPU),
        }
        result = model.model.apply_model(x, sigma, transformer_options={}, **conds)
        assert result.shape == x.shape
        assert result.device == GPU
        assert result.dtype == torch.float32
        assert budget != BUDGETS["all"] or where(model.model.diffusion_model) == {"cuda"}


def files_saved_by_comfyui_load_again(context: Context) -> None:
    weights = context.part("flowcore.weights.checkpoint")
    for name in SMALL:
        model = context.model(architecture=name)
        path = context.models / "diffusion_models" / f"resaved-{name}.safetensors"
        state = model.model.state_dict_for_saving()
        comfy.utils.save_torch_file({key: t.contiguous().clone() for key, t in state.items()}, str(path))
        again = weights.load_model(path)
        assert again.architecture.name == name
        assert again.config == model.model.config
        path.unlink()


ARCHITECTURE_CHECKS: tuple[Callable[[Context], None], ...] = (
    architectures_equal_plain_python,
    odd_sizes_are_padded_and_cropped,
    an_empty_negative_prompt_is_what_training_dropped,
    levels_are_laid_out_as_each_model_wants,
    files_may_state_their_shift,
    every_lora_key_is_used,
    lora_acts_the_same_under_every_budget,
    blocks_can_be_replaced,
    attention_can_be_replaced,
    weights_that_need_float32_keep_it,
    low_precision_stays_near,
    long_prompts_are_cut_as_in_plain_python,
    conditions_of_other_models_are_named,
    architectures_on_fake_gpu,
    files_saved_by_comfyui_load_again,
)
