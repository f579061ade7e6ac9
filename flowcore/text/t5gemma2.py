"""T5Gemma2 text encoder: prompts to token states, padding included.

The network is the text half of transformers' T5Gemma2 encoder, which needs transformers 5; neither the
decoder nor the image half is read. Recipe: hidden states after the final norm of BOS + text, cut and
padded to the model's length, 128 tokens in published models; the attention is masked, but the states of
padding are handed on as they are.

Source: Particle1904/SingleStreamDiT_T5Gemma2, preprocess.py.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from einops import repeat
from torch import Tensor, nn
from transformers import GemmaTokenizer, PreTrainedTokenizerFast
from transformers import __version__ as transformers_version

from ..conditioning import Conditioning, TextShape
from ..errors import ConfigError, settings_fit
from ..weights.strict import assign_strict
from .encoder import NetworkTextEncoder, token_id
from .files import TextFiles, plain_settings, write_text_file
from .kinds import find_parts
from .tokens import pad_rows, token_row

WHAT = "T5Gemma2 text encoder"
_IMAGE_END = 256_000
_SIDES = ("left", "right")


class T5Gemma2TextEncoder(NetworkTextEncoder):
    """The text half of a T5Gemma2 encoder with its tokenizer.

    Every prompt becomes as many states as the model reads, so that no other prompt of a call changes its
    result. The side of the padding decides where in the sequence the text stands, which a diffusion model has
    learned: it is the tokenizer's own unless told otherwise.
    """

    kind = "t5gemma2"

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerFast,
        shape: TextShape | None = None,
        *,
        padding_side: str | None = None,
    ) -> None:
        """Join a network and a tokenizer; ConfigError for an unknown side, or settings without BOS or PAD."""
        super().__init__(model, tokenizer, shape)
        self.padding_side = padding_side or tokenizer.padding_side
        if self.padding_side not in _SIDES:
            raise ConfigError(f"padding_side must be left or right, got {self.padding_side!r}")
        self.bos, self.pad = (token_id(model.config, name) for name in ("bos_token_id", "pad_token_id"))

    def tokenize(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return token ids `b m` (BOS + text, cut at the end, padded to the model's length) and the mask."""
        known, length = int(self.model.config.vocab_size), self.shape.length
        rows = [[self.bos, *token_row(self.tokenizer, prompt, known)][:length] for prompt in prompts]
        return pad_rows(rows, self.pad, length, side=self.padding_side)

    def condition(self, ids: Tensor, mask: Tensor, mode: str) -> Conditioning:  # noqa: ARG002 - as the others
        """Return the states `b m d`, float32, those of padding as they are: without a mask."""
        return Conditioning(context=text_states(self.model, ids, mask).float())

    def _facts(self) -> tuple[object, ...]:
        return (*super()._facts(), self.padding_side)


def text_states(model: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    """Return the states `b m d` after the final norm, of ids `b m` and mask `b m` (True = real).

    Positions count from the start of the row, padding included.
    """
    positions = repeat(torch.arange(ids.shape[1], device=ids.device), "m -> b m", b=ids.shape[0])
    states: Tensor = model(
        input_ids=ids, attention_mask=mask.long(), position_ids=positions
    ).last_hidden_state
    return states


def build_network(config: Mapping[str, Any], *, source: str, device: torch.device | str = "cpu") -> nn.Module:
    """Return a network of the settings of a config.json, with random weights, or none on the device "meta".

    Raises: ConfigError if the settings are not T5Gemma2's, one does not fit, or transformers is too old.
    """
    settings, image_end = _text_settings(config, source)
    try:
        from transformers import T5Gemma2TextConfig
        from transformers.models.t5gemma2.modeling_t5gemma2 import T5Gemma2TextEncoder as Network
    except ImportError as err:
        raise ConfigError(
            f"transformers must be 5 or newer for T5Gemma2, got {transformers_version}; "
            "run: pip install -U transformers"
        ) from err
    with settings_fit(source, "T5Gemma2"):
        typed = T5Gemma2TextConfig(**settings)
    typed.dropout_rate = (
        0.0  # which only the settings of encoder and decoder together have; nothing trains here
    )
    with torch.device(device):
        network: nn.Module = Network(typed, eoi_token_index=image_end)
    return network


def network_from_tensors(
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    *,
    source: str,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """Return the network of a config.json's settings and of tensors under any of the published names.

    device, dtype: of its weights; None = as they are. The scale of the embeddings is rounded to the dtype of
    the weights when it is used: what the published bfloat16 weights gave is only repeated in bfloat16.
    Raises: ConfigError or CheckpointError, naming the source.
    """
    state = next((part.state for part in find_parts(tensors, source) if part.kind.name == "t5gemma2"), {})
    network = build_network(config, source=source, device="meta")
    assign_strict(network, state, source=source, what=WHAT, device=device, dtype=dtype)
    for name, module in list(network.named_modules()):
        if "rotary" in name.rsplit(".", 1)[-1]:
            network.set_submodule(name, type(module)(module.config))
    embedding: Any = network.get_submodule("embed_tokens")
    embedding.embed_scale = torch.tensor(float(embedding.scalar_embed_scale))
    return network


def from_files(files: TextFiles, shape: TextShape | None = None) -> T5Gemma2TextEncoder:
    """Return the text encoder of settings, weights and tokenizer that were read.

    The side of the padding is that of Gemma's tokenizers where the files state none.
    Raises: CheckpointError or ConfigError, naming the file.
    """
    network = network_from_tensors(
        files.settings or {}, files.state, source=files.source, device=files.device, dtype=files.dtype
    )
    tokenizer = files.tokenizer()
    side = files.padding_side or GemmaTokenizer.padding_side
    return T5Gemma2TextEncoder(network, tokenizer, shape, padding_side=side)


def save_text_encoder(
    path: str | Path, encoder: T5Gemma2TextEncoder, *, metadata: Mapping[str, str] | None = None
) -> None:
    """Write network, settings, tokenizer and padding side to one file, replacing an earlier one at once."""
    embedding: Any = encoder.model.get_submodule("embed_tokens")
    write_text_file(
        path,
        encoder.model.state_dict(),
        config={**encoder.model.config.to_dict(), "eoi_token_index": embedding.eoi_token_index},
        tokenizer=encoder.tokenizer,
        metadata={**(metadata or {}), "flowcore.padding_side": encoder.padding_side},
        architecture="T5Gemma2TextEncoder",
    )


def _text_settings(config: Mapping[str, Any], source: str) -> tuple[dict[str, Any], int]:
    """Return the settings of the text half, and the id of the end of an image."""
    kind = config.get("model_type")
    if kind == "t5gemma2":
        config = config.get("encoder") or {}
        kind = config.get("model_type", "t5gemma2_encoder")
    if kind not in ("t5gemma2_encoder", "t5gemma2_text"):
        raise ConfigError(f"the model_type of {source} must be t5gemma2, got {kind}")
    image_end = config.get("eoi_token_index", _IMAGE_END)
    values = config.get("text_config") if kind == "t5gemma2_encoder" else config
    if not isinstance(values, Mapping) or not isinstance(image_end, int):
        raise ConfigError(f"the config of {source} must have a text_config, got {sorted(config)}")
    dropped = ("model_type", "eoi_token_index")
    return {key: value for key, value in plain_settings(values).items() if key not in dropped}, image_end
