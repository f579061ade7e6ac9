"""From an Exo file to a pipeline: its trunk, what reads its prompts, its autoencoder."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch

from ..assets import list_builtin
from ..devices import find_dtype
from ..errors import CheckpointError, ConfigError
from ..hub import find_folder
from ..models.exo import Exo, ExoConfig
from ..models.exo.trunk_config import BYTE_TOKENS
from ..parts import Source, part_source
from ..text.qwen3_vl import ByteTokenizer, ChatTokenizer, PromptReader, Tokenizer
from ..weights.checkpoint import LoadedModel
from ..weights.exo import attach_trunk, load_trunk, trunk_folder
from ..weights.placement import move
from .facts import stated_vae
from .offload import check_offload, place
from .quantized import QUANTIZED, quantize

_BYTE_IMAGE = 256 + BYTE_TOKENS.index("<|image_pad|>")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrunkOptions:
    """How the trunk of an Exo model is loaded.

    dtype: of its weights: "auto" = as the rest of the model, a name of `devices.find_dtype`, or of
    `quantized.QUANTIZED`. offload: what lies on the CPU until it is needed, a name of `offload.OFFLOADS`.
    may_download: whether a repository that is not in the Hugging Face cache may be fetched.
    """

    dtype: str = "auto"
    offload: str = "none"
    may_download: bool = False

    def check(self, device: torch.device) -> None:
        """Check the options for a device. Raises: ConfigError."""
        check_offload(self.offload, device)
        if self.dtype not in ("auto", *QUANTIZED):
            find_dtype(self.dtype, device)
        if self.dtype == "nf4" and self.offload == "layers":
            raise ConfigError("offload must be none or vision with a trunk of nf4, got layers; take int8")


def give_trunk(
    loaded: LoadedModel,
    path: Path,
    *,
    trunk: Source | None,
    options: TrunkOptions,
    device: torch.device,
    dtype: torch.dtype,
) -> PromptReader:
    """Attach the trunk that a file names, unless it holds it; return what reads prompts for it.

    trunk: folder or repository; None = what the file names. Of a file that holds its trunk, it is where the
    processor is; the small trunks read bytes and need none.
    Raises: CheckpointError on one line, naming the file.
    """
    model = cast("Exo", loaded.model)
    if model.config.embeds_trunk:
        tokenizer = _own_tokenizer(model, trunk, path)
    else:
        folder = trunk_folder(loaded, path, trunk=trunk, may_download=options.may_download)
        tokenizer = byte_tokenizer(model.config) or ChatTokenizer(folder)
        attach_trunk(loaded, path, load_trunk(folder), source=str(folder))
    _place_trunk(model, options, device, dtype)
    return prompt_reader(model.config, tokenizer)


def _place_trunk(model: Exo, options: TrunkOptions, device: torch.device, dtype: torch.dtype) -> None:
    """Bring the trunk to the precision and the places of the options; dtype: that of the rest."""
    assert model.trunk is not None
    if options.dtype in QUANTIZED:
        quantize(model.trunk, options.dtype)
    elif options.dtype != "auto":
        dtype = find_dtype(options.dtype, device)
    move(model.trunk, None, dtype)
    place(model.trunk, options.offload, device)


def vae_source(
    given: Source | None, metadata: Mapping[str, str], model: Path, *, may_download: bool = False
) -> str:
    """Return where the autoencoder is: the argument, else what the file names.

    That is a name for any part, or as Exo's own: beside the file, a path, a bundled name, or a repository.
    Raises: CheckpointError if it is nowhere.
    """
    place = stated_vae(metadata, model.name)
    if given is not None or "flowcore.vae" in metadata or place is None:
        return part_source("vae", given, metadata, model)
    for root in (model.parent / place.repo, Path(place.repo)):
        if (root / place.subfolder).exists():
            return str(root / place.subfolder)
    if place.repo in list_builtin():
        return place.repo
    return str(find_folder(place.repo, may_download=may_download, what="VAE") / place.subfolder)


def _own_tokenizer(model: Exo, trunk: Source | None, path: Path) -> Tokenizer:
    """Return the tokenizer for a trunk that lies in the model's file."""
    reads_bytes = byte_tokenizer(model.config)
    if reads_bytes is not None:
        return reads_bytes
    if trunk is None:
        raise CheckpointError(
            f"{path.name} holds a trunk that must come with its processor, got none; pass the folder of its "
            "tokenizer with text_encoder= (--text-encoder)"
        )
    return ChatTokenizer(find_folder(trunk))


def byte_tokenizer(config: ExoConfig) -> ByteTokenizer | None:
    """Return the tokenizer of a small trunk; None for others."""
    if config.trunk["image_token_id"] != _BYTE_IMAGE:
        return None
    return ByteTokenizer(config.words)


def prompt_reader(config: ExoConfig, tokenizer: Tokenizer) -> PromptReader:
    """Return what reads prompts for a trunk with a tokenizer."""
    patch = int(config.trunk["vision_config"]["patch_size"])
    identity = f"exo-{type(tokenizer).__name__}{'-image-first' if config.image_first else ''}"
    return PromptReader(tokenizer, identity, patch=patch, image_first=config.image_first)
