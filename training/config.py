"""Everything a run can be told: strict tables, read from YAML or TOML, overridden by `--set`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path, PureWindowsPath
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import (
    AliasChoices,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from flowcore.errors import ConfigError
from training.config_file import assign, describe, merged, read_table
from training.strict import Pattern, Strict
from training.train_table import Train

CELL = 8
"""Pixels of an image that one latent cell stands for, on a side."""


Beta = Annotated[float, Field(ge=0, lt=1)]
DEVICES = frozenset(
    {"CON", "PRN", "AUX", "NUL", *(f"{port}{n}" for port in ("COM", "LPT") for n in range(1, 10))}
)
Precision = Literal["float32", "bfloat16", "float16"]


class Output(Strict):
    """Where the run's folder lies and how its final weights are stored."""

    dir: str = "runs"
    name: str = "run"
    dtype: Precision = "float32"

    @field_validator("name")
    @classmethod
    def _plain(cls, name: str) -> str:
        is_plain = re.fullmatch(r"[\w.-]+", name) and name.strip(".") == name
        if not is_plain or _is_reserved(name):
            raise ValueError("must be a plain folder name of letters, digits, '-', '_' and '.'")
        return name


def _is_reserved(name: str) -> bool:
    """Whether Windows takes a name for a device, whatever its ending."""
    return PureWindowsPath(name).stem.partition(".")[0].upper() in DEVICES


def _multiple_of(step: int, size: int) -> int:
    """`size` itself. Raises: ValueError that names the nearest multiples if it is none."""
    if size < step or size % step:
        low = max(step, size // step * step)
        raise ValueError(f"must be a multiple of {step}, got {size}; nearest are {low} and {low + step}")
    return size


class Model(Strict):
    """Architecture, its sizes, and weights to start from."""

    arch: Literal["xut", "flux", "tinyflux", "single_stream", "exo"]
    preset: str = "tiny"
    weights: str | None = None
    overrides: dict[str, Any] = Field(default_factory=dict)


class Dataset(Strict):
    """One folder of images, each with a caption file of the same name; or of encoded samples.

    kind: `trajectories` are made by `training.trajectories`; `latents` are safetensors files, one a sample,
    with the tensors of `batch.safetensors` without the batch axis. edits: beside each trajectory an edit,
    whose source is the one that is stored with it, else has a rectangle of another one's latents in it;
    read as composites, too, its name before.
    """

    kind: Literal["folder", "trajectories", "latents"] = "folder"
    path: str
    caption_extension: str = Field(".txt", pattern=r"^\.\w+$")
    repeats: int = Field(1, ge=1)
    edits: bool = Field(False, validation_alias=AliasChoices("edits", "composites"))

    @model_validator(mode="after")
    def _edits_trajectories(self) -> Dataset:
        if self.edits and self.kind != "trajectories":
            raise ValueError(f"edits must be false for kind {self.kind}, got true; set kind: trajectories")
        return self


class Buckets(Strict):
    """Picture sizes in pixels."""

    resolution: int = Field(256, ge=16, le=8192)
    multiple: int = Field(16, ge=8, le=512)
    max_aspect: float = Field(2.0, ge=1.0, le=8.0)

    @field_validator("multiple")
    @classmethod
    def _whole_cells(cls, multiple: int) -> int:
        return _multiple_of(CELL, multiple)

    @model_validator(mode="after")
    def _divisible(self) -> Buckets:
        if self.resolution % self.multiple:
            low = self.resolution // self.multiple * self.multiple
            raise ValueError(
                f"resolution must be a multiple of multiple ({self.multiple}), got {self.resolution}; "
                f"nearest are {low} and {low + self.multiple}"
            )
        return self


class Encoders(Strict):
    """VAE and text encoder: bundled name, folder or file; `pixels` and `bytes` need no weights.

    `text` is a list for models that read two, tokens and pooled vector, such as [t5, clip], and may name
    tokenizers, too. For exo with a trunk by reference it is the trunk, a folder or a repository of Qwen3-VL;
    its presets with a trunk of their own read bytes.
    """

    vae: str | None = None
    text: str | Annotated[list[str], Field(min_length=1)] | None = None

    @property
    def texts(self) -> list[str]:
        """The text encoders, none if they are left out."""
        return [self.text] if isinstance(self.text, str) else self.text or []


class Data(Strict):
    """What to do with samples that cannot be used."""

    on_error: Literal["stop", "skip"] = "stop"
    missing_caption: Literal["stop", "skip", "empty"] = "stop"

    def skips(self, setting: Literal["on_error", "missing_caption"]) -> bool:
        """Whether a sample is left out for what a setting is about."""
        return {"on_error": self.on_error, "missing_caption": self.missing_caption}[setting] == "skip"


class Cache(Strict):
    """Encoded latents and captions on disk; `dir: null` encodes at every start."""

    dir: str | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"


class Group(Strict):
    """Parameters whose name contains `pattern` (a regular expression), with settings of their own."""

    pattern: Pattern
    name: Literal["adamw", "muon", "sgd"] | None = None
    lr: float | None = Field(None, gt=0)
    rule: Literal["constant", "fan_in"] | None = None
    weight_decay: float | None = Field(None, ge=0)


class Optimizer(Strict):
    """Optimizer; the first group whose pattern matches a parameter decides over it.

    lr_profile `reference` gives every parameter reference_lr, the rate of the recipe's source.
    """

    name: Literal["adamw", "muon", "sgd"] = "adamw"
    lr: float = Field(1e-4, gt=0)
    rule: Literal["constant", "fan_in"] = "constant"
    weight_decay: float = Field(0.01, ge=0)
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    groups: tuple[Group, ...] = ()
    reference_lr: float | None = Field(None, gt=0)
    lr_profile: Literal["own", "reference"] = "own"

    @model_validator(mode="after")
    def _has_reference(self) -> Optimizer:
        if self.lr_profile == "reference" and self.reference_lr is None:
            raise ValueError("reference_lr must be given for lr_profile reference, got none")
        return self


class Schedule(Strict):
    """Multiplier of every learning rate over the steps.

    warmup_share: of the steps of the curve; warmup_steps, if given as well, is the most that it comes to.
    """

    name: Literal["constant", "linear", "cosine"] = "cosine"
    warmup_steps: int = Field(0, ge=0)
    warmup_share: float | None = Field(None, ge=0, le=1)
    steps: int | None = Field(None, ge=1)
    minimum: float = Field(0.0, ge=0, le=1)


class Ema(Strict):
    """Exponential moving average of the weights, in float32; `warmup` lets early updates count more."""

    decay: float | None = Field(None, gt=0, lt=1)
    warmup: bool = False


class Checkpoint(Strict):
    """How often the state is saved and how many copies stay."""

    every_steps: int = Field(1000, ge=1)
    keep: int = Field(2, ge=1)


class Sampling(Strict):
    """Sample grids during the run; `every_steps: 0` makes none."""

    every_steps: int = Field(0, ge=0)
    prompts: tuple[str, ...] = ()
    steps: int = Field(20, ge=1)
    cfg: float = Field(2.0, ge=0)
    seed: int = Field(0, ge=0)
    size: tuple[int, int] | None = None

    @field_validator("size")
    @classmethod
    def _whole_cells(cls, size: tuple[int, int] | None) -> tuple[int, int] | None:
        return size and (_multiple_of(CELL, size[0]), _multiple_of(CELL, size[1]))


class Distributed(Strict):
    """How the model is spread over the processes of a run.

    none: not at all; several processes then average their gradients, as with ddp. fsdp2 and zero3 divide
    weights, gradients, optimizer and average, zero2 gradients and optimizer; zero2 and zero3 are those of the
    package deepspeed. cpu_offload: what is divided waits in the memory of the CPU.
    """

    strategy: Literal["none", "ddp", "fsdp2", "zero2", "zero3"] = "none"
    cpu_offload: bool = False

    @model_validator(mode="after")
    def _divides_what_waits(self) -> Distributed:
        if self.cpu_offload and self.strategy in ("none", "ddp"):
            raise ValueError(f"cpu_offload must be false with strategy {self.strategy}, got true; use fsdp2")
        return self


class Logging(Strict):
    """What is written while training."""

    every_steps: int = Field(10, ge=1)
    tensorboard: bool = True
    plots: bool = True
    data_order: bool = False


class RunLogging(Logging):
    """The same of a model's run.

    export_batch: whether the first batch is written, data and conditions alone, as `batch.safetensors`.
    """

    export_batch: bool = False


class LoopConfig(Strict):
    """What every run has, whatever it trains."""

    has_stages: ClassVar[bool] = False

    output: Output = Output()
    seed: int = Field(0, ge=0)
    precision: Precision = "float32"
    train: Train
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    ema: Ema = Ema()
    checkpoint: Checkpoint = Checkpoint()
    sampling: Sampling = Sampling()
    logging: Logging = Logging()

    @model_validator(mode="after")
    def _has_steps_alone(self) -> LoopConfig:
        if not self.has_stages and (self.train.epochs or self.train.stages):
            raise ValueError("train.steps must tell the length of this run, got epochs or stages")
        return self

    @property
    def folder(self) -> Path:
        """Folder that holds everything of the run."""
        return Path(self.output.dir).expanduser() / self.output.name


class RunConfig(LoopConfig):
    """A run of `training.run`: a flow-matching model on folders of captioned images."""

    has_stages: ClassVar[bool] = True

    model: Model
    datasets: tuple[Dataset, ...] = Field(min_length=1)
    buckets: Buckets = Buckets()
    encoders: Encoders = Encoders()
    data: Data = Data()
    cache: Cache = Cache()
    logging: RunLogging = RunLogging()
    distributed: Distributed = Distributed()

    @model_validator(mode="after")
    def _stages_are_valid(self) -> RunConfig:
        for number in range(len(self.train.stages)):
            try:
                self.stage(number)
            except ValidationError as err:
                raise ValueError(describe(RunConfig, err, f"train.stages.{number}", [])) from err
        return self

    def stage(self, number: int) -> RunConfig:
        """The configuration of one stage by itself; its schedule is as long as it is, unless it says else."""
        stage = self.train.stages[number]
        table = self.model_dump()
        table["train"] |= {"stages": (), "epochs": None}
        table["schedule"]["steps"] = None
        for name in ("train", "optimizer", "schedule"):
            table[name] = merged(table[name], getattr(stage, name))
        table["train"]["steps"] = stage.steps
        return RunConfig.model_validate(table)


class PartConfig(LoopConfig):
    """A run that makes one of the demo's own parts, autoencoder or text encoder, from the same folders."""

    datasets: tuple[Dataset, ...] = Field(min_length=1)
    options: dict[str, float] = Field(default_factory=dict)


ConfigT = TypeVar("ConfigT", bound=LoopConfig)


def load_config(kind: type[ConfigT], path: Path, assignments: Sequence[str]) -> ConfigT:
    """Validated configuration from a YAML or TOML file and `key.path=value` assignments.

    Raises: ConfigError in one line that names file, key, the value got and what is allowed.
    """
    table = read_table(path)
    assigned = [assign(kind, table, assignment) for assignment in assignments]
    return validate(kind, table, str(path), assigned)


def validate(
    kind: type[ConfigT], table: dict[str, Any], source: str, assigned: Sequence[str] = ()
) -> ConfigT:
    """Configuration from a table. Raises: ConfigError that names `source`, or --set, and the key."""
    try:
        return kind.model_validate(table)
    except ValidationError as err:
        raise ConfigError(describe(kind, err, source, assigned)) from err
