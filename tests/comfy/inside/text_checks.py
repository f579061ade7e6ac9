"""Checks of the text encoders as ComfyUI's CLIP, each kind against plain Python."""

from collections.abc import Callable
from typing import Any

import comfy.sd
import comfy.utils
import torch
from context import Context
from fake_gpu import BUDGETS, GPU, on_fake_gpu

PROMPT = "a red circle on a blue background"
GEMMA3, T5GEMMA2 = "standin-text.safetensors", "standin-t5gemma2.safetensors"
T5, CLIP = "t5/model.safetensors", "clip/model.safetensors"
CHOICES: tuple[tuple[tuple[str, ...], str], ...] = (
    ((GEMMA3,), "xut"),
    ((T5GEMMA2,), "single_stream"),
    ((T5, CLIP), "tinyflux"),
    ((CLIP, T5), "flux"),
)
"""The files that are chosen, and the architecture that reads the text."""


def encoded(clip: Any, prompt: str) -> tuple[torch.Tensor, dict[str, Any]]:
    """What CLIP Text Encode makes of a prompt."""
    with torch.inference_mode():
        ((states, entries),) = clip.encode_from_tokens_scheduled(clip.tokenize(prompt))
    return states, entries


def text_encoder_takes_lora(context: Context) -> None:
    clip = context.clip()
    key = "text_encoders.model.layers.0.self_attn.q_proj"
    rows, columns = clip.cond_stage_model.model.layers[0].self_attn.q_proj.weight.shape
    lora = {f"{key}.lora_A.weight": torch.ones(1, columns), f"{key}.lora_B.weight": torch.ones(rows, 1)}
    _, changed = comfy.sd.load_lora_for_models(None, clip, lora, 0.0, 1.0)
    with torch.inference_mode():
        plain, patched = (c.encode(PROMPT).clone() for c in (clip, changed))
        again = clip.encode(PROMPT)
    assert not torch.allclose(plain, patched, atol=1e-4)
    assert torch.equal(plain, again)


def text_encoder_equals_plain_python(context: Context) -> None:
    path = context.models / "text_encoders" / "standin-text.safetensors"
    halved = path.with_name("bfloat16.safetensors")
    encoder = context.part("flowcore.text.loading").load_text_encoder(path, dtype=torch.float32)
    state = {name: tensor.bfloat16() for name, tensor in encoder.model.state_dict().items()}
    encoder.model.load_state_dict(state)  # rounded, in float32
    files = context.part("flowcore.text.files")
    files.write_text_file(
        halved, state, config=encoder.model.config.to_diff_dict(), tokenizer=encoder.tokenizer, metadata={}
    )
    load = context.part("nodes.host.text").load_clip
    for mode in ("sequence", "pooled"):
        with torch.inference_mode():
            clip = load([halved], mode)
            ((found, extras),) = clip.encode_from_tokens_scheduled(clip.tokenize(PROMPT))
            expected = encoder.encode([PROMPT], mode).context
        assert torch.allclose(found, expected, atol=1e-6), (found - expected).abs().max()
        assert found.dtype == torch.float32
        assert extras.get("pooled_output") is None
        assert "flowcore_empty" not in extras
        ((empty, extras),) = clip.encode_from_tokens_scheduled(clip.tokenize(""))
        assert extras["flowcore_empty"] == empty.shape[1] == 1
    halved.unlink()


def parentheses_are_text(context: Context) -> None:
    clip = context.clip()
    (section,) = clip.tokenize("a (red:1.4) circle")["gemma3"]
    assert all(weight == 1.0 for _, weight in section)
    assert len(section) > 6  # the marks are tokens of their own


def last_layer_can_be_left_out(context: Context) -> None:
    clip = context.clip()
    with torch.inference_mode():
        last = clip.encode(PROMPT)
        earlier = clip.clone()
        earlier.clip_layer(-2)
        assert not torch.allclose(earlier.encode(PROMPT), last, atol=1e-4)
        assert torch.equal(clip.encode(PROMPT), last)


def text_encoders_equal_plain_python(context: Context) -> None:
    load = context.part("flowcore.text.loading").load_text_encoder
    find = context.part("flowcore.models").find_architecture
    presets = {"xut": "xut-small", "flux": "flux-dev", "tinyflux": "tinyflux-deep", "single_stream": "v3-768"}
    for names, architecture in CHOICES:
        plain = load([context.models / "text_encoders" / name for name in names], dtype=torch.float32)
        shape = find(architecture).text_shape(find(architecture).presets[presets[architecture]])
        for part in (plain, *(getattr(plain, name, plain) for name in ("states", "vector"))):
            part.shape = shape
        clip = context.clip("sequence", *names, text_for=architecture)
        for prompt in ("a red bee", ""):
            states, entries = encoded(clip, prompt)
            with torch.inference_mode():
                expected = plain.encode([prompt])
            assert torch.allclose(states, expected.context, atol=1e-5), (architecture, prompt)
            assert states.dtype == torch.float32
            assert (entries["pooled_output"] is None) == (expected.pooled is None)
            if expected.pooled is not None:
                assert torch.allclose(entries["pooled_output"], expected.pooled, atol=1e-5), architecture
            assert entries.get("flowcore_empty") == (None if prompt else states.shape[1])
            assert "attention_mask" not in entries
        lengths = {"xut": 1, "flux": 512, "tinyflux": 128, "single_stream": 128}
        assert states.shape[1] == lengths[architecture]


def text_encoders_on_fake_gpu(context: Context) -> None:
    for names, architecture in CHOICES:
        for mode in ("sequence", "pooled") if names == (GEMMA3,) else ("sequence",):
            for budget in BUDGETS.values():
                clip = context.clip(mode, *names, text_for=architecture)
                tokens = clip.tokenize(PROMPT if T5 not in names else "a red bee")
                with on_fake_gpu(clip.patcher, budget):
                    clip.cond_stage_model.load_device = GPU
                    states, pooled, _ = clip.cond_stage_model.encode_token_weights(tokens)
                    assert states.dtype == torch.float32
                    assert states.shape[-1] == 32
                    assert (pooled is None) == (len(names) == 1)


def text_encoders_saved_by_comfyui_load_again(context: Context) -> None:
    for names in ((GEMMA3,), (T5GEMMA2,), (T5,)):
        clip = context.clip("sequence", *names)
        path = context.models / "text_encoders" / "resaved.safetensors"
        state = {**clip.get_sd(), **clip.tokenizer.state_dict()}
        comfy.utils.save_torch_file({key: t.contiguous().clone() for key, t in state.items()}, str(path))
        again = context.clip("sequence", path.name)
        assert torch.equal(encoded(again, "a red bee")[0], encoded(clip, "a red bee")[0]), names
        path.unlink()


def text_encoders_that_do_not_fit_are_named(context: Context) -> None:
    for arguments, text_for, expected in (
        (("pooled", T5, CLIP), "auto", "text_mode must be one of sequence for it, got 'pooled'"),
        (("sequence", CLIP), "auto", "text encoders must be one for the tokens"),
        (("sequence", T5), "exo", "text_for must be auto or one of xut, flux, tinyflux, single_stream"),
    ):
        message = ""
        try:
            context.clip(*arguments, text_for=text_for)
        except ValueError as error:
            message = str(error)
        assert message.startswith(expected), message
        assert "\n" not in message


TEXT_CHECKS: tuple[Callable[[Context], None], ...] = (
    text_encoder_takes_lora,
    text_encoder_equals_plain_python,
    parentheses_are_text,
    last_layer_can_be_left_out,
    text_encoders_equal_plain_python,
    text_encoders_on_fake_gpu,
    text_encoders_saved_by_comfyui_load_again,
    text_encoders_that_do_not_fit_are_named,
)
