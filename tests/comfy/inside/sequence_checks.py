"""Checks of a Flux between sequences: the same tokens as in plain Python, under every stock sampler."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import comfy.sample
import comfy.samplers
import comfy.sd
import comfy.utils
import torch
from context import Context
from fake_gpu import BUDGETS, GPU, on_fake_gpu
from torch import Tensor

import nodes as stock

FILE = "standin-sequences.safetensors"


def loaded(context: Context, name: str = FILE, dtype: str = "default") -> Any:
    """A model, as the loader node gives it."""
    with torch.inference_mode():
        return context.part("nodes.sequences").LoadSequences.execute(model_name=name, weight_dtype=dtype).args


def curves(context: Context, count: int) -> Tensor:
    """Samples of the condition space."""
    codec = context.part("flowcore.flux").Fourier(harmonics=3, count=24)
    return codec.decode(torch.randn(count, 3, 4, generator=torch.Generator().manual_seed(1)))


def conditions(context: Context, model: Any, samples: Tensor) -> tuple[Any, Any]:
    """Positive and negative of samples, as the node gives them."""
    node = context.part("nodes.sequences").SequenceConditioning
    return node.execute(model=model, numbers=json.dumps(samples.tolist())).args


def run(
    model: Any, sampler: str, positive: Any, negative: Any, *, batch: int = 2, cfg: float = 1.0
) -> Tensor:
    """Five steps of KSampler from an empty sequence."""
    with torch.inference_mode():
        latent = {"samples": torch.zeros(batch, 2, 24)}
        (made,) = stock.KSampler().sample(
            model, 3, 5, cfg, sampler, "simple", positive, negative, latent, denoise=1.0
        )
    return made["samples"]


def sequences_equal_plain_python(context: Context) -> None:
    flux, flow = context.part("flowcore.flux"), context.part("flowcore.flow")
    model, info = loaded(context)
    assert info == (
        "flux: 0.3 million parameters in float32; from fourier (3 tokens of 4 channels) to points (24 tokens "
        "of 2 channels)"
    )
    plain = flux.load_transport(context.models / "diffusion_models" / FILE)
    for count, batch in ((1, 3), (3, 3)):
        samples = curves(context, count)
        positive, negative = conditions(context, model, samples)
        noise = comfy.sample.prepare_noise(torch.zeros(batch, 2, 24), 3)
        for cfg in (1.0, 3.0):
            found = run(model, "euler", positive, negative, batch=batch, cfg=cfg)
            given = flux.conditioning_of(plain.spaces, samples.expand(batch, -1, -1))
            predict = flux.velocity_fn(plain.model, given, cfg)
            with torch.inference_mode():
                expected = flow.SOLVERS["euler"](predict, noise, flow.sigma_grid(5))
            assert float((found - expected).abs().max()) < 1e-5, (count, cfg)


def every_stock_sampler_takes_sequences(context: Context) -> None:
    model, _ = loaded(context)
    positive, negative = conditions(context, model, curves(context, 2))
    for sampler in comfy.samplers.KSampler.SAMPLERS:
        found = run(model, sampler, positive, negative, cfg=2.0)
        assert found.shape == (2, 2, 24), sampler
        assert torch.isfinite(found).all(), sampler
        assert 0.1 < float(found.std()) < 100, sampler


def sequences_are_encoded_decoded_and_drawn(context: Context) -> None:
    nodes = context.part("nodes.sequences")
    model, _ = loaded(context)
    samples = curves(context, 2)
    (latent,) = nodes.EmptySequence.execute(model=model, batch_size=3).args
    assert latent["samples"].shape == (3, 2, 24)
    assert not latent["samples"].any()
    encoded, source = nodes.SequenceEncode.execute(model=model, numbers=json.dumps(samples.tolist())).args
    assert abs(float(encoded["samples"].std()) - 1) < 0.3
    assert torch.equal(source.generate_noise({"samples": torch.zeros(3, 2, 24)})[2], encoded["samples"][0])
    numbers, decoded = nodes.SequenceDecode.execute(model=model, samples=encoded).args
    assert torch.allclose(decoded["samples"], samples, atol=1e-5)
    assert torch.allclose(torch.tensor(json.loads(numbers)), samples, atol=1e-5)
    (again, _) = nodes.SequenceEncode.execute(model=model, latent=decoded).args
    assert torch.allclose(again["samples"], encoded["samples"], atol=1e-5)
    (pictures,) = nodes.SequencePreview.execute(model=model, samples=encoded, size=64).args
    assert pictures.shape == (2, 64, 64, 3)
    assert 0 <= float(pictures.min()) < float(pictures.max()) <= 1
    assert not torch.equal(pictures[0], pictures[1])


def paths_may_begin_at_data(context: Context) -> None:
    flux, flow = context.part("flowcore.flux"), context.part("flowcore.flow")
    model, _ = loaded(context)
    samples = curves(context, 2)
    positive, _ = conditions(context, model, samples)
    node = context.part("nodes.sequences").SequenceEncode
    _, source = node.execute(model=model, numbers=json.dumps(samples.flip(0).tolist())).args
    empty = {"samples": torch.zeros(2, 2, 24)}
    sampler, sigmas = comfy.samplers.sampler_object("euler"), flow.sigma_grid(4).float()
    with torch.inference_mode():
        found = comfy.sample.sample_custom(
            model, source.generate_noise(empty), 1.0, sampler, sigmas, positive, positive, empty["samples"],
            disable_pbar=True, seed=source.seed,
        )  # fmt: skip
        plain = flux.load_transport(context.models / "diffusion_models" / FILE)
        made = flux.transport(plain.model, samples, space=plain.spaces, source=samples.flip(0), steps=4)
    (_, decoded) = (
        context.part("nodes.sequences").SequenceDecode.execute(model=model, samples={"samples": found}).args
    )
    assert torch.allclose(decoded["samples"], made, atol=1e-4)


def sequences_take_lora_and_low_precision(context: Context) -> None:
    model, _ = loaded(context)
    positive, negative = conditions(context, model, curves(context, 2))
    plain = run(model, "euler", positive, negative)
    layer = "double_blocks.0.img_attn.qkv"
    lora = {
        f"diffusion_model.{layer}.lora_A.weight": torch.full((2, 48), 0.3),
        f"diffusion_model.{layer}.lora_B.weight": torch.full((144, 2), 0.3),
    }
    patched, _ = comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0)
    assert len(patched.patches) == 1
    assert not torch.allclose(run(patched, "euler", positive, negative), plain, atol=1e-3)
    for dtype, limit in (("bfloat16", 0.1), ("float16", 0.02)):
        low, _ = loaded(context, dtype=dtype)
        error = (run(low, "euler", positive, negative) - plain).std() / plain.std()
        assert 0 < float(error) < limit, (dtype, float(error))


def sequences_on_fake_gpu(context: Context) -> None:
    for dtype in ("default", "bfloat16"):
        for budget in BUDGETS.values():
            model, _ = loaded(context, dtype=dtype)
            with on_fake_gpu(model, budget):
                conds = {
                    "c_crossattn": torch.zeros(2, 3, 4, device=GPU),
                    "txt_ids": torch.zeros(2, 3, 2, dtype=torch.long, device=GPU),
                    "img_ids": torch.zeros(2, 24, 2, dtype=torch.long, device=GPU),
                }
                x, sigma = torch.zeros(2, 2, 24, device=GPU), torch.ones(2, device=GPU)
                result = model.model.apply_model(x, sigma, transformer_options={}, **conds)
                assert result.shape == x.shape
                assert result.device == GPU


def saved_sequences_load_again(context: Context) -> None:
    model, _ = loaded(context)
    positive, negative = conditions(context, model, curves(context, 2))
    path = context.models / "diffusion_models" / "resaved-sequences.safetensors"
    state = model.model.state_dict_for_saving()
    comfy.utils.save_torch_file({key: t.contiguous().clone() for key, t in state.items()}, str(path))
    again, _ = loaded(context, path.name)
    expected = run(model, "euler", positive, negative)
    assert torch.equal(run(again, "euler", *conditions(context, again, curves(context, 2))), expected)
    path.unlink()


def pictures_go_in_and_come_out(context: Context) -> None:
    """A model from small colored pictures to gray ones."""
    flux, checkpoint = context.part("flowcore.flux"), context.part("flowcore.weights.checkpoint")
    nodes = context.part("nodes.sequences")
    codecs = (
        flux.Patches(patch=2, colors=3, height=4, width=6),
        flux.Patches(patch=2, colors=1, height=4, width=4),
    )
    first, second = (flux.Space.fit(codec, torch.randn(64, *codec.shape)) for codec in codecs)
    presets = context.part("flowcore.models.flux").PRESETS
    config = dataclasses.replace(
        presets["points"], in_channels=4, out_channels=4, context_in_dim=12, axes_dim=(4, 6, 6)
    )
    network = context.part("flowcore.models.flux").Flux(config)
    path = context.models / "diffusion_models" / "gray.safetensors"
    metadata = flux.SpacePair(condition=first, data=second).to_metadata()
    checkpoint.save_model(path, network.state_dict(), architecture="flux", config=config, metadata=metadata)
    model, _ = loaded(context, path.name)
    image = torch.rand(2, 4, 6, 3, generator=torch.Generator().manual_seed(2))
    positive, negative = nodes.SequenceConditioning.execute(model=model, image=image).args
    assert positive[0][0].shape == (2, 6, 12)
    assert not negative[0][0].any()
    latent, _ = nodes.SequenceEncode.execute(model=model, image=image[:, :, :4]).args
    (shown,) = nodes.SequencePreview.execute(model=model, samples=latent, size=4).args
    assert torch.allclose(shown.mean(-1), image[:, :, :4].mean(-1), atol=0.01)
    with torch.inference_mode():
        (made,) = stock.KSampler().sample(model, 0, 2, 2.0, "euler", "simple", positive, negative, latent)
    assert made["samples"].shape == (2, 4, 4)
    path.unlink()


def faults_of_sequences_are_named(context: Context) -> None:
    nodes = context.part("nodes.sequences")
    model, _ = loaded(context)
    positive, negative = conditions(context, model, curves(context, 1))
    other = context.model(architecture="flux")
    latent, picture = {"samples": torch.zeros(1, 2, 24)}, torch.zeros(1, 8, 8, 3)
    encode, decode = nodes.SequenceEncode.execute, nodes.SequenceDecode.execute
    text = [[torch.zeros(1, 3, 4), {}]]
    faults: tuple[tuple[Callable[[], Any], str], ...] = (
        (lambda: encode(model=model), "one of numbers, image and latent must be given, got none"),
        (
            lambda: encode(model=model, numbers="1", latent=latent),
            "one of numbers, image and latent must be given, got numbers, latent",
        ),
        (lambda: encode(model=model, image=picture), "image must be left out, for this points space"),
        (lambda: encode(model=model, latent=latent), "samples of this points space must have shape b 24 2"),
        (lambda: encode(model=model, numbers="1 2"), "numbers of this points space must be finite and"),
        (lambda: decode(model=model, samples={"samples": picture}), "latent must be b 2 24 as this model"),
        (lambda: decode(model=other, samples=latent), "model must be a Flux between sequences, got another"),
        (
            lambda: run(model, "euler", text, text),
            "conditioning for a Flux between sequences must come from Sequence Conditioning",
        ),
        (
            lambda: stock.KSampler().sample(model, 0, 2, 1.0, "euler", "simple", positive, negative, {
                "samples": torch.zeros(1, 2, 8, 8)
            }),
            "latents for this model must be b 2 24, a token a column, got (1, 2, 8, 8); use Empty Sequence",
        ),
        (
            lambda: loaded(context, "standin-flux.safetensors"),
            "standin-flux.safetensors must be a flux model that states its spaces, got flux without; make "
            "one with python -m training.sequences curves",
        ),
        (
            lambda: loaded(context, "standin-xut.safetensors"),
            "standin-xut.safetensors must be a flux model that states its spaces, got xut without",
        ),
    )  # fmt: skip
    for fault, expected in faults:
        message = ""
        try:
            with torch.inference_mode():
                fault()
        except ValueError as error:
            message = str(error)
        assert message.startswith(expected), (expected, message)
        assert "\n" not in message
    sentence = nodes.LoadSequences.validate_inputs("curves.safetensors")
    assert "'python -m training.sequences curves'" in sentence
    assert nodes.LoadSequences.validate_inputs(Path(FILE).name) is True


SEQUENCE_CHECKS: tuple[Callable[[Context], None], ...] = (
    sequences_equal_plain_python,
    every_stock_sampler_takes_sequences,
    sequences_are_encoded_decoded_and_drawn,
    paths_may_begin_at_data,
    sequences_take_lora_and_low_precision,
    sequences_on_fake_gpu,
    saved_sequences_load_again,
    pictures_go_in_and_come_out,
    faults_of_sequences_are_named,
)
