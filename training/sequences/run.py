"""Builds a run between sequences from its configuration, and writes what it made."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from flowcore.errors import CheckpointError, ConfigError
from flowcore.flux import Space, SpacePair, codec_from_dict
from flowcore.models.flux import PRESETS, Flux, FluxConfig
from flowcore.weights.checkpoint import save_model
from training.files import RunError, write_atomic
from training.launch import launch
from training.loop import DTYPES, Run
from training.sequences.config import SequenceConfig
from training.sequences.objective import SequenceObjective
from training.sequences.tasks import PairSource, open_task
from training.stop import StopFlag

SCORE_FILE = "score.json"
Limits = Mapping[str, tuple[float | None, float | None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A configuration, checked, with its pairs and the model's sizes."""

    config: SequenceConfig
    pairs: PairSource
    spaces: SpacePair
    model_config: FluxConfig


def prepare(config: SequenceConfig) -> Prepared:
    """Reads or draws the pairs and settles spaces and sizes.

    Raises: ConfigError, ShapeError, CheckpointError that name what does not fit.
    """
    pairs = open_task(
        config.task,
        is_paired=config.source == "paired",
        seed=config.seed,
        batch_size=config.train.batch_size,
        held_out=config.scoring.count,
    )
    condition = Space.fit(codec_from_dict(config.condition), pairs.known.condition)
    data = Space.fit(codec_from_dict(config.data), pairs.known.data)
    known = pairs.measure(pairs.held_out.data.float(), pairs.held_out)
    unknown = set(config.scoring.limits) - set(known)
    if unknown:
        raise ConfigError(f"scoring.limits must name {', '.join(known)}, got {min(unknown)}")
    spaces = SpacePair(condition=condition, data=data)
    return Prepared(config=config, pairs=pairs, spaces=spaces, model_config=_sizes(config, spaces))


def _sizes(config: SequenceConfig, spaces: SpacePair) -> FluxConfig:
    """Sizes of the preset with the overrides and the token widths of the spaces. Raises: ConfigError."""
    if config.model.preset not in PRESETS:
        raise ConfigError(f"model.preset must be one of {', '.join(PRESETS)}, got {config.model.preset!r}")
    settled = {
        "in_channels": spaces.data.codec.channels,
        "out_channels": spaces.data.codec.channels,
        "context_in_dim": spaces.condition.codec.channels,
        "pooled_from_text": False,
    }
    clash = set(config.model.overrides) & set(settled)
    if clash:
        raise ConfigError(f"model.overrides must leave {min(clash)} to the spaces; change condition or data")
    try:
        sizes = FluxConfig.from_dict(
            {**PRESETS[config.model.preset].to_dict(), **config.model.overrides, **settled}
        )
    except ConfigError as err:
        raise ConfigError(f"model.overrides: {err}") from err
    if len(sizes.axes_dim) != spaces.num_axes:
        raise ConfigError(
            f"model.overrides.axes_dim must have {spaces.num_axes} entries for these spaces, "
            f"got {list(sizes.axes_dim)}"
        )
    return sizes


def start(prepared: Prepared, stop: StopFlag, resume: str) -> bool:
    """Trains to the last step and scores; False if a stop came first."""
    config = prepared.config

    def build(device: torch.device, stop: StopFlag) -> SequenceObjective:
        del stop
        torch.manual_seed(config.seed)
        objective = SequenceObjective(
            Flux(prepared.model_config), prepared.pairs, prepared.spaces, config, device=device
        )
        if config.train.compile:
            objective.module.compile()
        return objective

    def finish(run: Run, folder: Path) -> None:
        objective = run.objective
        assert isinstance(objective, SequenceObjective)
        final = folder / "final"
        final.mkdir(exist_ok=True)
        state = run.module.state_dict()
        save_sequences(final / "model.safetensors", state, prepared)
        if run.ema:
            save_sequences(final / "ema.safetensors", {**state, **run.ema.average}, prepared)
        with run.averaged():
            scores = objective.score(stop)
        write_atomic(folder / SCORE_FILE, json.dumps(scores, indent=1) + "\n")

    results = ("final/model.safetensors", SCORE_FILE)
    return launch(config, build, finish, stop, resume, results=results)


def save_sequences(path: Path, state: Mapping[str, Tensor], prepared: Prepared) -> None:
    """Writes weights with their spaces. Raises: RunError if the file cannot be written."""
    dtype = DTYPES[prepared.config.output.dtype]
    metadata = {"modelspec.title": prepared.config.output.name, **prepared.spaces.to_metadata()}
    cast = {name: tensor.to(dtype) for name, tensor in state.items()}
    try:
        save_model(path, cast, architecture="flux", config=prepared.model_config, metadata=metadata)
    except CheckpointError as err:
        raise RunError(str(err)) from err


def missed(scores: Mapping[str, float], limits: Limits) -> dict[str, str]:
    """What each measurement that is out of its limits should be."""
    faults = {}
    for name, (low, high) in limits.items():
        if low is not None and not scores[name] >= low:
            faults[name] = f"must be at least {low:g}"
        elif high is not None and not scores[name] <= high:
            faults[name] = f"must be at most {high:g}"
    return faults
