"""What exo needs besides the other architectures: a trunk, a reader of prompts, and its file's facts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from flowcore.errors import CheckpointError, ConfigError
from flowcore.exo.facts import TRAINING, VAE, describe_training, describe_vae
from flowcore.exo.loading import byte_tokenizer, prompt_reader
from flowcore.hub import find_folder
from flowcore.models.exo import Exo, ExoConfig
from flowcore.models.exo.lora import describe_changes
from flowcore.text.qwen3_vl import ChatTokenizer, PromptReader, Tokenizer
from flowcore.weights.exo import FORMAT, load_trunk, trunk_reference
from training.config import RunConfig
from training.loop import DTYPES
from training.stages import stage_at, stages_of, tables_of
from training.train_table import ExoTraining


def check_exo(config: RunConfig, model_config: ExoConfig) -> None:
    """Raises: ConfigError, CheckpointError if the run cannot be, with another trunk or task."""
    trunk_folder(config, model_config)
    spoken = next((_spoken(table.train.exo) for table in tables_of(config) if _spoken(table.train.exo)), None)
    if spoken and any(dataset.kind == "latents" for dataset in config.datasets):
        raise ConfigError(
            f"train.exo must not learn {spoken} with a dataset of kind latents, which has no captions; take "
            "task velocity, masks or projector without words"
        )
    if spoken and not model_config.embeds_trunk:
        raise ConfigError(
            f"train.exo must not learn {spoken} for preset {config.model.preset!r}, whose trunk is by "
            "reference; take task velocity, masks or projector without words"
        )


def compile_blocks(model: Exo) -> None:
    """Have the blocks of both heads compiled when first called; prompts and steps are calls of their own."""
    for head in (model.diffusion_head, model.edit_head):
        for block in head.blocks:
            block.compile()


def _spoken(recipe: ExoTraining) -> str | None:
    """What of a recipe takes captions and a trunk of one's own."""
    if recipe.task in ("language", "rewrite"):
        return f"task {recipe.task}"
    return "words" if recipe.task == "projector" and recipe.words else None


def _trunk_name(config: RunConfig) -> str | None:
    """What `encoders.text` names. Raises: ConfigError if it names several."""
    names = config.encoders.texts
    if len(names) > 1:
        raise ConfigError(f"encoders.text must name one trunk for exo, got {', '.join(names)}")
    return names[0] if names else None


def trunk_folder(config: RunConfig, model_config: ExoConfig) -> Path | None:
    """The folder of the trunk by reference that `encoders.text` names; None for an own trunk.

    Raises: ConfigError, CheckpointError.
    """
    name = _trunk_name(config)
    if model_config.embeds_trunk:
        if name not in (None, "bytes"):
            raise ConfigError(
                f"encoders.text must be bytes or left out for preset {config.model.preset!r}, whose trunk "
                f"reads the text itself, got {name}"
            )
        return None
    if name is None:
        raise ConfigError(
            f"encoders.text must name the trunk of preset {config.model.preset!r}, a folder or a repository "
            "of Qwen3-VL, got none"
        )
    try:
        return find_folder(Path(name).expanduser() if Path(name).expanduser().is_dir() else name)
    except CheckpointError as err:
        raise CheckpointError(f"encoders.text: {err}") from err


def attach_trunk(model: Exo, config: RunConfig, model_config: ExoConfig) -> None:
    """Gives a model its trunk by reference, frozen, in the precision of the run."""
    folder = trunk_folder(config, model_config)
    if folder is not None:
        model.attach(load_trunk(folder, dtype=DTYPES[config.precision]))


def read_prompts(config: RunConfig, model_config: ExoConfig) -> PromptReader:
    """What makes token ids of prompts.

    Raises: ConfigError, CheckpointError if that takes the trunk's tokenizer and template, and one is missing.
    """
    tokenizer: Tokenizer | None = byte_tokenizer(model_config)
    if tokenizer is None:
        folder = trunk_folder(config, model_config)
        if folder is None:
            raise ConfigError(
                "model.overrides: a trunk of one's own must read bytes, with the image token 260, got "
                f"{model_config.trunk['image_token_id']}; set embeds_trunk to false"
            )
        tokenizer = ChatTokenizer(folder)
    return prompt_reader(model_config, tokenizer)


def exo_facts(
    config: RunConfig, model_config: ExoConfig, step: int, stated: Mapping[str, str]
) -> dict[str, str]:
    """Metadata of an Exo file: its format, its trunk, the rank of its changes, its autoencoder, its training.

    stated: what the file says besides, among it the autoencoder and its latent space, if it has one.
    """
    folder = trunk_folder(config, model_config)
    stages = stages_of(config)
    stage = stages[stage_at(stages, max(step - 1, 0))]
    trained = stage.config.train.exo
    facts = {
        "exo.format": FORMAT,
        "exo.trunk": json.dumps(trunk_reference(_trunk_name(config), folder)),
        TRAINING: describe_training(
            stage=stage.name or trained.task,
            step=step,
            data=[Path(dataset.path).name for dataset in config.datasets],
            iterations=trained.iterations,
        ),
    }
    if model_config.lora_rank:
        facts["exo.lora"] = json.dumps(describe_changes(model_config))
    if "flowcore.latent_spec" in stated:
        facts[VAE] = describe_vae(stated["flowcore.latent_spec"], stated["flowcore.vae"])
    return facts
