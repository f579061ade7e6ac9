"""T5Gemma2 text encoder: prompts to token states, padding included.

The network is the text half of transformers' T5Gemma2 encoder, which needs transformers 5; neither the
decoder nor the image half is read. Recipe: hidden states after the final norm of BOS + text, cut to 128
tokens and always padded to 128; the attention is masked, but the states of padding are handed on as they are.

Source: Particle1904/SingleStreamDiT_T5Gemma2, preprocess.py.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import torch
from einops import repeat
from torch import Tensor, nn
from transformers import GemmaTokenizer, PreTrainedTokenizerFast
from transformers import __version__ as transformers_version

from ..assets import resolve
from ..conditioning import Conditioning
from ..errors import CheckpointError, ConfigError
from ..weights.atomic import write_tensors
from ..weights.checkpoint import read_tensors
from ..weights.placement import move
from ..weights.strict import assign_strict
from .files import TOKENIZER_TENSOR, tokenizer_from_json

PaddingSide: TypeAlias = Literal["left", "right"]
MAX_TOKENS = 128
WHAT = "T5Gemma2 text encoder"
# transformers 5 itself writes the second and third of these; the first is on the hub.
PREFIXES = (
    "model.encoder.",
    "model.encoder.text_model.",
    "encoder.text_model.",
    "encoder.",
    "text_model.",
    "",
)
_UNUSED = ("vision_tower.", "multi_modal_projector.")
_IMAGE_END = 256_000
_NO_SETTINGS = ("architectures", "transformers_version", "model_type")


class T5Gemma2TextEncoder:
    """The text half of a T5Gemma2 encoder with its tokenizer. Its weights are frozen.

    Every prompt becomes exactly 128 states, so that no other prompt of a call changes its result. The side of
    the padding decides where in the sequence the text stands, which a diffusion model has learned: it is the
    tokenizer's own unless told otherwise.
    """

    def __init__(
        self, model: nn.Module, tokenizer: PreTrainedTokenizerFast, *, padding_side: PaddingSide | None = None
    ) -> None:
        """Join a network and a tokenizer; ConfigError for an unknown side, or settings without BOS or PAD."""
        self.padding_side = padding_side or tokenizer.padding_side
        if self.padding_side not in get_args(PaddingSide):
            raise ConfigError(f"padding_side must be left or right, got {self.padding_side!r}")
        self.bos, self.pad = (_token_id(model.config, name) for name in ("bos_token_id", "pad_token_id"))
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer

    @property
    def width(self) -> int:
        """Length of a token state."""
        return int(self._settings.hidden_size)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> "T5Gemma2TextEncoder":
        """Move the weights in place and return self; rotary tables stay float32 whatever the dtype."""
        move(self.model, device, dtype)
        return self

    def tokenize(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return token ids `b 128` (BOS + text, cut at the end, padded) and the mask, True = real.

        Raises: ConfigError if prompts are one text, or hold a token that is not the network's.
        """
        if isinstance(prompts, str):
            raise ConfigError(
                f"prompts must be a list of texts, got one text {prompts[:40]!r}; put it in a list"
            )
        rows = [self._token_ids(prompt) for prompt in prompts]
        ids = torch.full((len(rows), MAX_TOKENS), self.pad)
        mask = torch.zeros_like(ids, dtype=torch.bool)
        for number, row in enumerate(rows):
            start = MAX_TOKENS - len(row) if self.padding_side == "left" else 0
            ids[number, start : start + len(row)] = torch.tensor(row)
            mask[number, start : start + len(row)] = True
        return ids, mask

    def encode(self, prompts: Sequence[str], mode: str = "sequence") -> Conditioning:
        """Return the prompts' conditioning: the states `b 128 d`, float32, without a mask.

        An empty text is encoded like any other (BOS and padding); `null` gives the condition of no text.
        Raises: ConfigError if there is no prompt, a token is not the network's, or mode is not "sequence".
        """
        if mode != "sequence":
            raise ConfigError(f"the text mode of a T5Gemma2 encoder must be sequence, got {mode!r}")
        if not prompts:
            raise ConfigError("prompts must be at least one, got none")
        ids, mask = (part.to(self.device) for part in self.tokenize(prompts))
        return Conditioning(context=text_states(self.model, ids, mask).float())

    def null(self, count: int = 1) -> Conditioning:
        """Return the condition of no text: `count` times 128 zero states."""
        return Conditioning(context=torch.zeros(count, MAX_TOKENS, self.width, device=self.device))

    def unknown_words(self, prompt: str) -> list[str]:
        """Return the parts of a prompt that the tokenizer does not know, in order."""
        found = self.tokenizer(prompt, add_special_tokens=False, return_offsets_mapping=True)
        unknown = self.tokenizer.unk_token_id
        pairs = zip(found["input_ids"], found["offset_mapping"], strict=True)
        return [prompt[start:end] for token, (start, end) in pairs if token == unknown]

    @property
    def _settings(self) -> Any:  # noqa: ANN401 - a class of transformers
        return self.model.config

    def _token_ids(self, prompt: str) -> list[int]:
        """Return BOS and the first tokens of the text."""
        ids: list[int] = self.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        size = int(self._settings.vocab_size)
        foreign = [token for token in ids if token >= size]
        if foreign:
            word = self.tokenizer.convert_ids_to_tokens(foreign[0])
            raise ConfigError(
                f"the prompt must consist of the network's {size} tokens, got {word!r}; remove it"
            )
        return [self.bos, *ids[: MAX_TOKENS - 1]]


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
    try:
        typed = T5Gemma2TextConfig(**settings)
    except Exception as err:  # the check behind it has error classes that differ between its versions
        reason = " ".join(str(err).split())
        raise ConfigError(f"settings of {source} must fit T5Gemma2, got {reason}") from err
    typed.dropout_rate = (
        0.0  # which only the settings of encoder and decoder together have; nothing trains here
    )
    with torch.device(device):
        network: nn.Module = Network(typed, eoi_token_index=image_end)
    return network


def network_from_tensors(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], *, source: str
) -> nn.Module:
    """Return the network of a config.json's settings and of tensors under any of the published names.

    The scale of the embeddings is rounded to the dtype of the weights when it is used: what the published
    bfloat16 weights gave is only repeated in bfloat16.
    Raises: ConfigError or CheckpointError, naming the source.
    """
    state = _bare_keys(tensors, source)
    network = build_network(config, source=source, device="meta")
    assign_strict(network, state, source=source, what=WHAT)
    for name, module in list(network.named_modules()):
        if "rotary" in name.rsplit(".", 1)[-1]:
            network.set_submodule(name, type(module)(module.config))
    embedding: Any = network.get_submodule("embed_tokens")
    embedding.embed_scale = torch.tensor(float(embedding.scalar_embed_scale))
    return network


def load_text_encoder(
    path_or_name: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    padding_side: PaddingSide | None = None,
) -> T5Gemma2TextEncoder:
    """Return the text encoder of a Hugging Face folder, a safetensors file, or a bundled name.

    Nothing is looked up on the network.

    Args:
        path_or_name: a folder with config.json, tokenizer.json and weights, or a file with the settings in
            its metadata `flowcore.config` and the tokenizer in the tensor `tokenizer_json`; either may lie
            beside the file instead.
        device: where the weights go.
        dtype: of weights and computation; None keeps the file's, bfloat16 in the published ones.
        padding_side: None = what tokenizer_config.json or the file says, else that of Gemma's tokenizers.
    Raises: CheckpointError or ConfigError, naming the file.
    """
    path = resolve(path_or_name)
    folder = path if path.is_dir() else path.parent
    single = path / "model.safetensors"
    tensors, metadata = read_tensors(single if path.is_dir() and single.is_file() else path)
    own = tensors.pop(TOKENIZER_TENSOR, None)
    config = _json(
        metadata.get("flowcore.config") or _read_beside(folder, "config.json", path.name), path.name
    )
    network = network_from_tensors(config, tensors, source=path.name)
    if own is not None:
        text = own.cpu().numpy().tobytes().decode("utf-8")
    else:
        text = _read_beside(folder, "tokenizer.json", path.name)
    stated = metadata.get("flowcore.padding_side")
    if stated is None and (folder / "tokenizer_config.json").is_file():
        text_settings = (folder / "tokenizer_config.json").read_text(encoding="utf-8")
        stated = _json(text_settings, path.name).get("padding_side")
    tokenizer = tokenizer_from_json(text, source=path.name)
    tokenizer.padding_side = stated or GemmaTokenizer.padding_side
    return T5Gemma2TextEncoder(network, tokenizer, padding_side=padding_side).to(device, dtype)


def save_text_encoder(
    path: str | Path, encoder: T5Gemma2TextEncoder, *, metadata: Mapping[str, str] | None = None
) -> None:
    """Write network, settings, tokenizer and padding side to one file, replacing an earlier one at once."""
    text = encoder.tokenizer.backend_tokenizer.to_str()
    packed = torch.frombuffer(bytearray(text.encode("utf-8")), dtype=torch.uint8)
    embedding: Any = encoder.model.get_submodule("embed_tokens")
    settings: Any = encoder.model.config
    config = {**settings.to_dict(), "eoi_token_index": embedding.eoi_token_index}
    own = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "T5Gemma2TextEncoder",
        "flowcore.config": json.dumps(config),
        "flowcore.padding_side": encoder.padding_side,
    }
    write_tensors(path, {**encoder.model.state_dict(), TOKENIZER_TENSOR: packed}, {**(metadata or {}), **own})


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
    dropped = (*_NO_SETTINGS, "eoi_token_index")
    return {key: value for key, value in values.items() if key not in dropped}, image_end


def _bare_keys(tensors: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """Return the text half's tensors without their prefix."""
    for prefix in PREFIXES:
        if f"{prefix}embed_tokens.eoi_embedding" in tensors:
            bare = {
                name.removeprefix(prefix): tensor
                for name, tensor in tensors.items()
                if name.startswith(prefix)
            }
            return {name: tensor for name, tensor in bare.items() if not name.startswith(_UNUSED)}
    raise CheckpointError(
        f"{source} must hold a T5Gemma2 encoder (embed_tokens.eoi_embedding), got {len(tensors)} tensors "
        f"without it ({', '.join(sorted(tensors)[:5])}); pass a text encoder"
    )


def _read_beside(folder: Path, name: str, source: str) -> str:
    """Return the text of a file in the weights' folder."""
    path = folder / name
    if not path.is_file():
        raise CheckpointError(
            f"the text encoder {source} must come with {name}, got none in its folder; copy it there"
        )
    return path.read_text(encoding="utf-8")


def _json(text: str, source: str) -> dict[str, Any]:
    try:
        values = json.loads(text)
    except json.JSONDecodeError as err:
        raise CheckpointError(f"the settings of {source} must be JSON, got {err}") from err
    if not isinstance(values, dict):
        raise CheckpointError(f"the settings of {source} must be a JSON object, got {type(values).__name__}")
    return values


def _token_id(config: Any, name: str) -> int:  # noqa: ANN401 - a class of transformers
    """Return the id of a special token."""
    value = getattr(config, name)
    if not isinstance(value, int):
        raise ConfigError(f"{name} of the text encoder's config must be one number, got {value!r}")
    return value
