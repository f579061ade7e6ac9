"""A Gemma-3 text encoder as ComfyUI's CLIP: flowcore's own encoder with ComfyUI's layers in it."""

import json
import logging
from pathlib import Path
from typing import Any, TypeAlias

import comfy.model_management as mm
import comfy.ops
import comfy.sd
import torch
from comfy.cli_args import args
from comfy.supported_models_base import ClipTarget
from torch import Tensor, nn
from torch.nn import functional
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm, Gemma3TextScaledWordEmbedding

from ...flowcore.errors import ConfigError
from ...flowcore.text.gemma3 import Gemma3TextEncoder, load_text_encoder, text_states
from .model import EMPTY_PROMPT
from .operations import own_memory, use_operations

logger = logging.getLogger("flowcore")
NAME = "gemma3"
MODES = ("sequence", "pooled")
Tokens: TypeAlias = dict[str, list[list[tuple[Any, ...]]]]
"""ComfyUI's form: one list of (token id, weight) per section of the prompt."""


class _Embedding(comfy.ops.manual_cast.Embedding):
    """Gemma's scaled embedding, always in float32."""

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids, out_dtype=torch.float32).float() * self.embedding_dim**0.5


class _RMSNorm(Gemma3RMSNorm, comfy.ops.CastWeightBiasOp):
    """Gemma's norm with its weight brought to the input, and patched, at use."""

    comfy_cast_weights = True
    weight_function: list[Any] = []  # noqa: RUF012 - ComfyUI's contract: class attributes
    bias_function: list[Any] = []  # noqa: RUF012

    def forward(self, x: Tensor) -> Tensor:
        weight, _ = comfy.ops.cast_bias_weight(self, x, dtype=torch.float32)
        return (self._norm(x.float()) * (1.0 + weight)).type_as(x)


class TextModel(nn.Module):
    """What ComfyUI places, moves and patches. State-dict names are `model.<name in the encoder>`."""

    def __init__(self, encoder: Gemma3TextEncoder, mode: str) -> None:
        """Take over an encoder, whose layers become ComfyUI's."""
        super().__init__()
        special = {Gemma3RMSNorm: _RMSNorm, Gemma3TextScaledWordEmbedding: _Embedding}
        self.model = use_operations(encoder.model, comfy.ops.manual_cast, special)
        self.mode = mode
        self.empty = Tokenizer(encoder).tokenize_with_weights("")
        self.dtypes = {self.model.embed_tokens.weight.dtype}
        self.load_device: torch.device | None = None
        self.reset_clip_options()

    def set_clip_options(self, options: dict[str, Any]) -> None:
        """Take the options that ComfyUI sets before encoding; unknown ones are left alone."""
        self.layer = options.get("layer", self.layer)
        self.execution_device = options.get("execution_device", self.execution_device)

    def reset_clip_options(self) -> None:
        """Forget the options."""
        self.layer: int | None = None
        self.execution_device: torch.device | None = None

    def encode_token_weights(self, tokens: Tokens) -> tuple[Tensor, None, dict[str, Any]]:
        """Return the states `1 m d` (or the pooled vector as `1 1 d`), float32 on the intermediate device.

        The last part are further entries of the conditioning.
        """
        device = self.execution_device or self.load_device or self.model.embed_tokens.weight.device
        with torch.no_grad():
            parts = [self._encode([entry[0] for entry in section], device) for section in tokens[NAME]]
        states = torch.cat(parts, dim=1).to(mm.intermediate_device())
        return states, None, {EMPTY_PROMPT: states.shape[1]} if tokens == self.empty else {}

    def _encode(self, ids: list[int], device: torch.device) -> Tensor:
        rows = torch.tensor([ids], dtype=torch.long, device=device)
        mask = torch.ones_like(rows, dtype=torch.bool)
        states = self._states(rows, mask).float()
        if self.mode == "sequence":
            return states
        return functional.normalize(states.mean(dim=1, keepdim=True), dim=-1, eps=1e-8)

    def _states(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Return the last states, or those of the layer that CLIP Set Last Layer names, normed."""
        if self.layer in (None, -1):
            return text_states(self.model, ids, mask)
        count = int(self.model.config.num_hidden_layers)
        if abs(self.layer) > count:
            raise ConfigError(
                f"stop_at_clip_layer must lie in -{count}..-1 for this encoder, got {self.layer}"
            )
        output = self.model(
            input_ids=ids, attention_mask=mask.long(), output_hidden_states=True, use_cache=False
        )
        return self.model.norm(output.hidden_states[self.layer])

    def load_sd(self, state: dict[str, Tensor]) -> tuple[list[str], list[str]]:
        """Load weights by name and return the missing and unexpected ones."""
        missing, unexpected = self.load_state_dict(state, strict=False)
        return missing, unexpected


class Tokenizer:
    """ComfyUI's tokenizer calls, answered by the encoder's own. Parentheses are text, not weights."""

    def __init__(self, encoder: Gemma3TextEncoder) -> None:
        """Take the encoder whose tokenizer is used."""
        self.encoder = encoder

    def tokenize_with_weights(self, text: str, return_word_ids: bool = False, **_: Any) -> Tokens:
        """Return the ids of one prompt, each with weight 1 (and word id 0 when asked for)."""
        ids, _mask = self.encoder.tokenize([text])
        unknown = self.encoder.unknown_words(text)
        if unknown:
            logger.warning("the text encoder does not know %s", ", ".join(unknown))
        return {NAME: [[(token, 1.0, 0) if return_word_ids else (token, 1.0) for token in ids[0].tolist()]]}

    def untokenize(self, tokens: list[tuple[Any, ...]]) -> list[tuple[Any, str]]:
        """Return each entry with the token's text."""
        return [(entry, self.encoder.tokenizer.convert_ids_to_tokens(entry[0])) for entry in tokens]

    def state_dict(self) -> dict[str, Tensor]:
        """Return tokenizer and settings as bytes, which CLIPSave writes beside the weights."""
        config = {"flowcore.config": json.dumps(self.encoder.model.config.to_diff_dict())}
        texts = {
            "tokenizer_json": self.encoder.tokenizer.backend_tokenizer.to_str(),
            "flowcore_metadata": json.dumps(config),
        }
        return {
            key: torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8) for key, text in texts.items()
        }


def load_clip(path: Path, mode: str) -> comfy.sd.CLIP:
    """Return the text encoder of a file.

    Raises: CheckpointError or ConfigError, naming the file or the setting.
    """
    if mode not in MODES:
        raise ConfigError(f"text_mode must be one of {', '.join(MODES)}, got {mode!r}")
    logger.info("loading text encoder %s", path.name)
    with torch.inference_mode(False):
        encoder = load_text_encoder(path, dtype=None)
        dtype = _weight_dtype(encoder)
        own_memory(encoder.model, dtype)
        model = TextModel(encoder, mode)
    parameters = sum(weight.numel() for weight in model.parameters())
    target = ClipTarget(lambda **_: Tokenizer(encoder), lambda **_: model)
    # The weights lie on the offload device now; ComfyUI moves them when it encodes.
    options = {"dtype": dtype, "initial_device": mm.text_encoder_offload_device()}
    clip = comfy.sd.CLIP(target, parameters=parameters, model_options=options)
    model.load_device = clip.patcher.load_device
    return clip


def _weight_dtype(encoder: Gemma3TextEncoder) -> torch.dtype:
    """Return the dtype chosen on ComfyUI's command line, else the file's. Layers compute in float32."""
    choices = ("fp8_e4m3fn_text_enc", "fp8_e5m2_text_enc", "fp16_text_enc", "bf16_text_enc", "fp32_text_enc")
    if any(getattr(args, name, False) for name in choices):
        return mm.text_encoder_dtype(mm.text_encoder_device())
    return encoder.model.embed_tokens.weight.dtype
