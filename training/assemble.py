"""Builds what a flow-matching run needs from its configuration, in the order in which errors are cheapest."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flowcore.assets import resolve
from flowcore.errors import CheckpointError, ConfigError
from flowcore.models import Architecture, find_architecture
from flowcore.models.exo import Exo
from flowcore.weights.checkpoint import load_model, save_model
from training import exo_parts
from training.config import LoopConfig, RunConfig
from training.data.buckets import Bucket, bucket_sizes, nearest_bucket
from training.data.encoded import EncodedSamples
from training.data.folder import scan
from training.data.sample import Reject, Sample
from training.encoders import CaptionEncoder, ImageEncoder, caption_encoder, image_encoder
from training.files import RunError, rename, save_tensors, write_atomic, write_failure
from training.loop import DTYPES, Run
from training.objectives.exo import ExoObjective
from training.objectives.flow_matching import FlowMatchingObjective, Judge, Recipe
from training.stages import resolve_length, stages_of, teachers_of
from training.stop import StopFlag


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A configuration with its model's settings and its scanned data; nothing is encoded or written yet."""

    config: RunConfig
    architecture: Architecture
    model_config: Any
    samples: list[Sample]
    buckets: list[Bucket]
    rejects: list[Reject]


def prepare(config: RunConfig, stop: StopFlag | None = None) -> Prepared:
    """Checks model settings, weights, encoders and data.

    Raises: ConfigError, CheckpointError, DataError, each naming the key or file; StoppedError.
    """
    architecture, model_config = prepare_model(config)
    parts = {"vae": [config.encoders.vae] if config.encoders.vae else [], "text": config.encoders.texts}
    if architecture.name == "exo":
        exo_parts.check_exo(config, model_config)
        del parts["text"]
    for key, names in parts.items():
        if not names and config.model.preset != "tiny":
            raise ConfigError(f"encoders.{key} must be named for preset {config.model.preset!r}, got none")
        for name in names:
            if name not in ("pixels", "bytes"):
                _resolve(f"encoders.{key}", name)
    for name in teachers_of(config):
        _resolve("train.teachers", name)
    if config.model.weights is not None:
        read_weights(config, architecture, model_config)
    samples, rejects = scan(config.datasets, config.data, stop)
    edit = next((sample for sample in samples if sample.is_edit), None)
    if edit and architecture.name != "exo":
        raise ConfigError(
            f"datasets must hold no source pictures for {architecture.name}, which does not see them, got "
            f"{edit.source or edit.path}; use exo or leave them out"
        )
    config = resolve_length(config, len(samples))
    settings = config.buckets
    sizes = bucket_sizes(settings.resolution, settings.multiple, settings.max_aspect)
    buckets = [
        Bucket(sample.width, sample.height)
        if sample.stored
        else nearest_bucket(sample.width, sample.height, sizes)
        for sample in samples
    ]
    return Prepared(
        config=config,
        architecture=architecture,
        model_config=model_config,
        samples=samples,
        buckets=buckets,
        rejects=rejects,
    )


def prepare_model(config: RunConfig) -> tuple[Architecture, Any]:
    """The architecture and the model's settings: preset and overrides. Raises: ConfigError."""
    architecture = find_architecture(config.model.arch)
    model = config.model
    if model.preset not in architecture.presets:
        known = ", ".join(architecture.presets)
        raise ConfigError(f"model.preset must be one of {known}, got {model.preset!r}")
    fields = architecture.presets[model.preset].to_dict()
    for path, value in model.overrides.items():
        *parents, last = path.split(".")
        table = fields
        for part in parents:
            table = table.get(part) if isinstance(table, dict) else None
        if not isinstance(table, dict):
            raise ConfigError(f"model.overrides: {path!r} must name a field of preset {model.preset!r}")
        _check_kind(f"model.overrides.{path}", table.get(last), value)
        table[last] = value
    try:
        return architecture, architecture.config_from_dict(fields)
    except (ConfigError, TypeError) as err:
        raise ConfigError(f"model.overrides: {err}") from err


def _check_kind(key: str, preset: object, value: object) -> None:
    """Raises: ConfigError if an override is of another kind than the preset's number, switch or name."""
    kinds: dict[type, tuple[tuple[type, ...], str]] = {
        bool: ((bool,), "true or false"),
        int: ((int, list), "a whole number"),
        float: ((int, float), "a number"),
        str: ((str,), "a name"),
    }
    if type(preset) not in kinds:
        return
    allowed, words = kinds[type(preset)]
    if type(value) not in allowed:
        raise ConfigError(f"{key} must be {words} as in the preset ({preset!r}), got {value!r}")


def build_model(prepared: Prepared) -> nn.Module:
    """The model in float32: seeded random weights, or those of `model.weights`, which must fit the preset."""
    config, architecture = prepared.config, prepared.architecture
    torch.manual_seed(config.seed)
    is_fresh = config.model.weights is None
    model = architecture.model(prepared.model_config, **(architecture.fresh if is_fresh else {}))
    if config.model.weights is not None:
        model.load_state_dict(read_weights(config, architecture, prepared.model_config))
    if isinstance(model, Exo):
        exo_parts.attach_trunk(model, config, prepared.model_config)
    return model


def read_weights(config: RunConfig, architecture: Architecture, model_config: Any) -> dict[str, Tensor]:  # noqa: ANN401 - each architecture has its own
    """Tensors of `model.weights`, which must be of the configured architecture and sizes.

    Raises: ConfigError, CheckpointError.
    """
    name = str(config.model.weights)
    loaded = load_model(_resolve("model.weights", name))
    if loaded.architecture is not architecture:
        raise ConfigError(
            f"model.weights: {name} must hold a {architecture.name} model, got {loaded.architecture.name}"
        )
    state = loaded.model.state_dict()
    expected = architecture.model(model_config, device="meta").state_dict()
    for key in sorted(set(state) | set(expected)):
        found, wanted = (tuple(t[key].shape) if key in t else "none" for t in (state, expected))
        if found != wanted:
            raise ConfigError(
                f"model.weights: {name} must have the sizes of preset {config.model.preset!r} and "
                f"model.overrides, got {key} of shape {found} for {wanted}; choose its preset"
            )
    return state


def _resolve(key: str, name: str) -> Path:
    """The file or folder that a name stands for. Raises: CheckpointError that names the key."""
    try:
        return resolve(name)
    except CheckpointError as err:
        raise CheckpointError(f"{key}: {err}") from err


def build_objective(
    prepared: Prepared, device: torch.device, stop: StopFlag, judge: Judge | None = None
) -> FlowMatchingObjective:
    """The objective with all samples encoded (or found in the cache).

    Raises: ConfigError if it is to be compiled without a compiler, or what an encoder or objective refuses.
    """
    config, architecture = prepared.config, prepared.architecture
    if config.train.compile:
        _check_compiler(device)
    model = build_model(prepared)
    channels = architecture.latent_channels(prepared.model_config)
    images = image_encoder(config.encoders.vae, channels, architecture.latent_spec, device)
    objective: FlowMatchingObjective
    if isinstance(model, Exo):
        chat = exo_parts.read_prompts(config, prepared.model_config)
        data = encode_samples(prepared, images, None, stop)
        objective = ExoObjective(
            model, architecture, data, images, chat, recipes_of(config), device=device, judge=judge
        )
    else:
        captions = caption_encoder(
            config.encoders.texts, architecture.text_shape(prepared.model_config), device
        )
        data = encode_samples(prepared, images, captions, stop)
        objective = FlowMatchingObjective(
            model, architecture, data, images, captions, recipes_of(config), device=device, judge=judge
        )
    if config.train.compile:
        if isinstance(model, Exo):
            exo_parts.compile_blocks(model)
        else:
            model.compile()
    return objective


def _check_compiler(device: torch.device) -> None:
    """Raises: ConfigError where compiled code needs a C++ compiler and there is none."""
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        if device.type == "cpu":
            get_cpp_compiler()
    except RuntimeError as err:
        raise ConfigError(
            "train.compile must be false on a CPU without a C++ compiler, got true; install one (g++, "
            "clang++ or MSVC) or set it to false"
        ) from err


def encode_samples(
    prepared: Prepared, images: ImageEncoder, captions: CaptionEncoder | None, stop: StopFlag
) -> EncodedSamples:
    """The samples as latents, and their captions as states if there is an encoder for them."""
    config = prepared.config
    return EncodedSamples(
        prepared.samples,
        prepared.buckets,
        images,
        captions,
        folder=Path(config.cache.dir).expanduser() if config.cache.dir else None,
        dtype=config.cache.dtype,
        stop=stop,
        is_lenient=config.data.on_error == "skip",
    )


def recipes_of(config: RunConfig) -> list[Recipe]:
    """What the objective takes from the configuration, for each stage."""
    return [_recipe(stage.config, stage.first) for stage in stages_of(config)]


def _recipe(config: LoopConfig, first_step: int) -> Recipe:
    assert isinstance(config, RunConfig)
    return Recipe(
        seed=config.seed,
        batch_size=config.train.batch_size,
        timesteps=config.train.timesteps,
        cond_dropout=config.train.cond_dropout,
        sampling=config.sampling,
        size=config.sampling.size or (config.buckets.resolution, config.buckets.resolution),
        is_checkpointed=config.train.gradient_checkpointing,
        attention=config.train.attention,
        first_step=first_step,
        sampling_shift=sampling_shift(config),
        teachers=config.train.teachers,
        exo=config.train.exo,
    )


def sampling_shift(config: RunConfig) -> float:
    """Shift of the noise levels at which a trained model is sampled: for exo that of its training."""
    return config.train.timesteps.shift if config.model.arch == "exo" else 1.0


def write_rejects(run: Run, folder: Path, prepared: Prepared) -> None:
    """Lists what was left out of the data, with reasons, in rejects.csv."""
    objective = run.objective
    assert isinstance(objective, FlowMatchingObjective)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["file", "reason"])
    writer.writerows([str(r.path), r.reason] for r in [*prepared.rejects, *objective.data.rejects])
    write_atomic(folder / "rejects.csv", text.getvalue())


def write_first_batch(run: Run, folder: Path) -> None:
    """Writes data and conditions of the first batch to `batch.safetensors`, if the run is to.

    Raises: RunError if the write fails.
    """
    config, objective, target = run.config, run.objective, folder / "batch.safetensors"
    assert isinstance(config, RunConfig)
    assert isinstance(objective, FlowMatchingObjective)
    if not config.logging.export_batch or target.exists():
        return
    aside = folder / f".tmp-{os.getpid()}-{target.name}"
    try:
        save_tensors(objective.batch_tensors(0), aside)
        rename(aside, target)
    except OSError as err:
        aside.unlink(missing_ok=True)
        raise write_failure(err, target) from err


def result_names(config: RunConfig) -> tuple[str, ...]:
    """Files in the run's folder that `write_final` makes."""
    return ("final/model.safetensors", *(("final/ema.safetensors",) if config.ema.decay else ()))


def write_final(run: Run, folder: Path) -> None:
    """Writes `final/model.safetensors`, and `ema.safetensors` if the run keeps an average."""
    config = run.config
    assert isinstance(config, RunConfig)
    weights, average = run.weights(), run.average()

    def write() -> None:
        final = folder / "final"
        final.mkdir(exist_ok=True)
        save_weights(weights, final / "model.safetensors", config, step=run.step)
        if average:
            save_weights({**weights, **average}, final / "ema.safetensors", config, step=run.step)

    run.team.lead(write)


def save_weights(
    state: Mapping[str, Tensor],
    path: Path,
    config: RunConfig,
    *,
    step: int,
    dtype: str | None = None,
    facts: Mapping[str, str] | None = None,
) -> None:
    """Writes weights in `output.dtype` (or `dtype`) under their original names, with what their users need.

    That is: sizes, resolution, shift of the sampled noise levels, latent space, VAE and text encoder; of exo
    its parts, too, and the training up to `step`; and the teachers, if there were some. `facts` are further
    metadata. Tables that a model derives for itself are left out.
    Raises: RunError if the file cannot be written.
    """
    architecture, model_config = prepare_model(config)
    names = [name for name, _ in architecture.model(model_config, device="meta").named_parameters()]
    channels = architecture.latent_channels(model_config)
    images = image_encoder(config.encoders.vae, channels, architecture.latent_spec, torch.device("cpu"))
    kind = DTYPES[dtype or config.output.dtype]
    resolution = config.sampling.size or (config.buckets.resolution, config.buckets.resolution)
    metadata = {
        "modelspec.title": config.output.name,
        "modelspec.resolution": f"{resolution[0]}x{resolution[1]}",
        "flowcore.shift": str(sampling_shift(config)),
        **{
            f"flowcore.{part}": name
            for part, name in (("vae", config.encoders.vae), ("text_encoder", _named(config.encoders.texts)))
            if name and not (part == "text_encoder" and architecture.name == "exo")
        },
        **({"flowcore.teachers": json.dumps(teachers)} if (teachers := teachers_of(config)) else {}),
        **images.facts,
        **(facts or {}),
    }
    if architecture.name == "exo":
        metadata = {**exo_parts.exo_facts(config, model_config, step, metadata), **metadata}
    cast = {name: state[name].to(kind) for name in names}
    try:
        save_model(path, cast, architecture=architecture, config=model_config, metadata=metadata)
    except CheckpointError as err:
        raise RunError(str(err)) from err


def _named(texts: list[str]) -> str:
    """Text encoders as metadata: a name, or several as a JSON list."""
    return json.dumps(texts) if len(texts) > 1 else "".join(texts)
