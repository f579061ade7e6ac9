"""Text encoders as ComfyUI's CLIP: flowcore's own, with ComfyUI's layers in them."""

import json
import logging
from collections.abc import Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any, TypeAlias

import comfy.model_management as mm
import comfy.sd
import torch
from comfy.cli_args import args
from comfy.supported_models_base import ClipTarget
from torch import Tensor, nn

from ...flowcore.conditioning import Conditioning, TextShape
from ...flowcore.errors import ConfigError
from ...flowcore.models import find_architecture
from ...flowcore.text.encoder import DEFAULT_SHAPE, NetworkTextEncoder, TextEncoder
from ...flowcore.text.loading import load_text_encoder
from ...flowcore.text.pair import PairTextEncoder
from .model import EMPTY_PROMPT, TEXT_START
from .operations import own_memory
from .text_layers import use_text_operations

logger = logging.getLogger("flowcore")
PRESETS = {"xut": "xut-small", "flux": "flux-dev", "tinyflux": "tinyflux-deep", "single_stream": "v3-768"}
"""The preset of an architecture that says how its prompts are cut and padded."""
_FLUX_WIDTH = 4096  # of T5-XXL, which of these architectures only Flux reads
Tokens: TypeAlias = dict[str, list[list[tuple[Any, ...]]]]
"""ComfyUI's form: for each network one list of (token id, weight) per section of the prompt."""
Encoders: TypeAlias = Mapping[str, NetworkTextEncoder]
"""The encoder of token states, then that of the vector if there is one, by kind."""


class TextModel(nn.Module):
    """What ComfyUI places, moves and patches.

    State-dict names are `model.<name in the encoder>`, and `vector.<name>` for the second encoder of a pair.
    """

    def __init__(self, encoders: Encoders, mode: str) -> None:
        """Take over encoders, whose layers become ComfyUI's."""
        super().__init__()
        self.encoders, self.empty = encoders, tokenized(encoders, "")
        for name, encoder in zip(("model", "vector"), encoders.values(), strict=False):
            self.add_module(name, use_text_operations(encoder.model))
        self.mode = mode
        self.dtypes = {parameter.dtype for parameter in self.parameters()}
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

    def encode_token_weights(self, tokens: Tokens) -> tuple[Tensor, Tensor | None, dict[str, Any]]:
        """Return states `1 m d`, the vector `1 k` if there is one, and further entries of the conditioning.

        All are float32 on the intermediate device.
        """
        device = self.execution_device or self.load_device or next(self.parameters()).device
        with torch.no_grad():
            said = [
                [
                    self._condition(encoder, [entry[0] for entry in section], device)
                    for section in tokens[kind]
                ]
                for kind, encoder in self.encoders.items()
            ]
        place = mm.intermediate_device()
        states = torch.cat([part.context for part in said[0]], dim=1).to(place)
        pooled = said[-1][0].pooled
        more = {EMPTY_PROMPT: states.shape[1]} if tokens == self.empty else {}
        more |= self._text_start(tokens)
        return states, None if pooled is None else pooled.to(place), more

    def _text_start(self, tokens: Tokens) -> dict[str, int]:
        """Return the entry that tells how much padding stands before the text, none where there is none."""
        kind, encoder = next(iter(self.encoders.items()))
        pad = encoder.tokenizer.pad_token_id
        count = sum(1 for _ in takewhile(lambda entry: entry[0] == pad, tokens[kind][0]))
        return {TEXT_START: count} if count else {}

    def _condition(self, encoder: NetworkTextEncoder, ids: list[int], device: torch.device) -> Conditioning:
        """Return what an encoder says of one section of a prompt."""
        rows = torch.tensor([ids], dtype=torch.long, device=device)
        mask = rows != encoder.tokenizer.pad_token_id
        if encoder.kind == "clip" or self.layer in (None, -1):
            return encoder.condition(rows, mask, self.mode)
        count = int(encoder.model.config.num_hidden_layers)
        if encoder.kind != "gemma3" or self.mode != "sequence" or not -count <= self.layer < 0:
            least = -count if encoder.kind == "gemma3" and self.mode == "sequence" else -1
            raise ConfigError(
                f"stop_at_clip_layer must lie in {least}..-1 for this encoder, got {self.layer}"
            )
        output = encoder.model(
            input_ids=rows, attention_mask=mask.long(), output_hidden_states=True, use_cache=False
        )
        return Conditioning(context=encoder.model.norm(output.hidden_states[self.layer]).float())

    def load_sd(self, state: dict[str, Tensor]) -> tuple[list[str], list[str]]:
        """Load weights by name and return the missing and unexpected ones."""
        missing, unexpected = self.load_state_dict(state, strict=False)
        return missing, unexpected


def tokenized(encoders: Encoders, text: str) -> Tokens:
    """Return the ids of one prompt for each network, each with weight 1."""
    return {
        kind: [[(token, 1.0) for token in encoder.tokenize([text])[0][0].tolist()]]
        for kind, encoder in encoders.items()
    }


class Tokenizer:
    """ComfyUI's tokenizer calls, answered by the encoders' own. Parentheses are text, not weights."""

    def __init__(self, encoders: Encoders) -> None:
        """Take the encoders whose tokenizers are used."""
        self.encoders = encoders
        self.first = next(iter(encoders.values()))

    def tokenize_with_weights(self, text: str, return_word_ids: bool = False, **_: Any) -> Tokens:
        """Return the ids of one prompt, each with weight 1 (and word id 0 when asked for)."""
        unknown = self.first.unknown_words(text)
        if unknown:
            logger.warning("the text encoder does not know %s", ", ".join(unknown))
        found = tokenized(self.encoders, text)
        if not return_word_ids:
            return found
        return {kind: [[(*entry, 0) for entry in section] for section in found[kind]] for kind in found}

    def untokenize(self, tokens: list[tuple[Any, ...]]) -> list[tuple[Any, str]]:
        """Return each entry with the token's text."""
        return [(entry, self.first.tokenizer.convert_ids_to_tokens(entry[0])) for entry in tokens]

    def state_dict(self) -> dict[str, Tensor]:
        """Return tokenizer and settings of one encoder as bytes, which CLIPSave writes beside the weights."""
        if len(self.encoders) > 1:
            return {}  # two tokenizers do not fit into one file; they lie beside the weights
        metadata = {"flowcore.config": json.dumps(self.first.model.config.to_diff_dict())}
        if hasattr(self.first, "padding_side"):
            metadata["flowcore.padding_side"] = self.first.padding_side
        texts = {
            "tokenizer_json": self.first.tokenizer.backend_tokenizer.to_str(),
            "flowcore_metadata": json.dumps(metadata),
        }
        return {
            key: torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8) for key, text in texts.items()
        }


def load_clip(paths: Sequence[Path], mode: str, text_for: str = "auto") -> comfy.sd.CLIP:
    """Return the text encoder of one file, or of two that make a pair.

    text_for: the architecture that reads the text, "auto" = the one that is known for such an encoder.
    Raises: CheckpointError or ConfigError, naming the file or the setting.
    """
    logger.info("loading text encoder %s", ", ".join(path.name for path in paths))
    with torch.inference_mode(False):
        encoders = _encoders(load_text_encoder(list(paths), dtype=None))
        first = next(iter(encoders.values()))
        if mode not in first.modes:
            raise ConfigError(f"text_mode must be one of {', '.join(first.modes)} for it, got {mode!r}")
        for encoder in encoders.values():
            encoder.shape = _shape(first, text_for)
            own_memory(encoder.model)
            encoder.to(dtype=_chosen_dtype())
        model = TextModel(encoders, mode)
    parameters = sum(weight.numel() for weight in model.parameters())
    target = ClipTarget(lambda **_: Tokenizer(encoders), lambda **_: model)
    # The weights lie on the offload device now; ComfyUI moves them when it encodes.
    options = {"dtype": next(model.parameters()).dtype, "initial_device": mm.text_encoder_offload_device()}
    clip = comfy.sd.CLIP(target, parameters=parameters, model_options=options)
    model.load_device = clip.patcher.load_device
    return clip


def _encoders(encoder: TextEncoder) -> Encoders:
    """Return the networks of an encoder by kind, that of the token states first."""
    parts = [encoder.states, encoder.vector] if isinstance(encoder, PairTextEncoder) else [encoder]
    return {part.kind: part for part in parts}


def _shape(first: NetworkTextEncoder, text_for: str) -> TextShape:
    """Return how prompts are cut and padded. Raises: ConfigError for an unknown architecture."""
    if text_for == "auto":
        if first.kind != "t5" or first.width != _FLUX_WIDTH:
            return DEFAULT_SHAPE
        text_for = "flux"
    if text_for not in PRESETS:
        raise ConfigError(f"text_for must be auto or one of {', '.join(PRESETS)}, got {text_for!r}")
    row = find_architecture(text_for)
    return row.text_shape(row.presets[PRESETS[text_for]])


def _chosen_dtype() -> torch.dtype | None:
    """Return the dtype chosen on ComfyUI's command line, None = the file's. Layers compute in float32."""
    choices = ("fp8_e4m3fn_text_enc", "fp8_e5m2_text_enc", "fp16_text_enc", "bf16_text_enc", "fp32_text_enc")
    if any(getattr(args, name, False) for name in choices):
        return mm.text_encoder_dtype(mm.text_encoder_device())
    return None
