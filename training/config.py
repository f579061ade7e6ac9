"""Everything a run can be told: strict tables, read from YAML or TOML, overridden by `--set`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path, PureWindowsPath
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from flowcore.errors import ConfigError
from training.config_file import assign, describe, merged, read_table

CELL = 8
"""Pixels of an image that one latent cell stands for, on a side."""


def _compiles(pattern: str) -> str:
    """The pattern. Raises: ValueError if it is no regular expression."""
    try:
        re.compile(pattern)
    except re.error as err:
        raise ValueError(f"must be a regular expression ({err})") from err
    return pattern


Beta = Annotated[float, Field(ge=0, lt=1)]
Pattern = Annotated[str, AfterValidator(_compiles)]
DEVICES = frozenset(
    {"CON", "PRN", "AUX", "NUL", *(f"{port}{n}" for port in ("COM", "LPT") for n in range(1, 10))}
)
Precision = Literal["float32", "bfloat16", "float16"]


class Strict(BaseModel):
    """Table without unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_switch_for_a_number(cls, value: object, info: ValidationInfo) -> object:
        field = cls.model_fields[info.field_name or ""]
        if isinstance(value, bool) and field.annotation is not bool:
            raise ValueError(f"must not be true or false, got {value}")
        return value


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
    """One folder of images, each with a caption file of the same name; or of `training.trajectories`."""

    kind: Literal["folder", "trajectories"] = "folder"
    path: str
    caption_extension: str = Field(".txt", pattern=r"^\.\w+$")
    repeats: int = Field(1, ge=1)


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

    For exo with a trunk by reference `text` is the trunk, a folder or a repository of Qwen3-VL; its presets
    with a trunk of their own read bytes.
    """

    vae: str | None = None
    text: str | None = None


class Data(Strict):
    """What to do with samples that cannot be used."""

    on_error: Literal["stop", "skip"] = "stop"
    missing_caption: Literal["stop", "skip", "empty"] = "stop"


class Cache(Strict):
    """Encoded latents and captions on disk; `dir: null` encodes at every start."""

    dir: str | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"


class Timesteps(Strict):
    """Law of the training noise levels (flow.md 4.1), 1 = noise."""

    law: Literal["logit_normal", "uniform"] = "logit_normal"
    mean: float = 0.0
    std: float = Field(1.0, gt=0)
    shift: float = Field(1.0, gt=0)


class ExoTraining(Strict):
    """What a run of exo minimises (exo.md 10); other architectures do not read it.

    task: velocity; projector = the picture's latents from its visual tokens; language = words from the states
    of the trunk's own text. The weights diffusion, edit and perceptual are those of the three losses; of the
    edit loss, sparsity is the price of a marked cell and labels the weight of the cells' known labels.
    iterations: least and most, drawn for each step. features: what the perceptual loss compares. plain_edits:
    whether samples without source picture have an edit loss, against the estimate of the first iteration.
    """

    task: Literal["velocity", "projector", "language"] = "velocity"
    iterations: tuple[Annotated[int, Field(ge=1, le=8)], Annotated[int, Field(ge=1, le=8)]] = (1, 4)
    diffusion: float = Field(0.9, ge=0)
    edit: float = Field(0.1, ge=0)
    perceptual: float = Field(0.05, ge=0)
    sparsity: float = Field(0.1, gt=0)
    labels: float = Field(0.2, ge=0)
    features: Literal["decoder_mid", "lpips", "none"] = "decoder_mid"
    plain_edits: bool = True

    @field_validator("iterations")
    @classmethod
    def _ordered(cls, iterations: tuple[int, int]) -> tuple[int, int]:
        if iterations[0] > iterations[1]:
            raise ValueError(f"must be the least and the most, got {list(iterations)}")
        return iterations


class StageTable(Strict):
    """A part of a run with a length of its own; train, optimizer and schedule override the run's sections."""

    name: str = Field("", pattern=r"^[\w-]*$")
    steps: int = Field(1, ge=1)
    epochs: float | None = Field(None, gt=0)
    train: dict[str, Any] = Field(default_factory=dict)
    optimizer: dict[str, Any] = Field(default_factory=dict)
    schedule: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _has_length(self) -> StageTable:
        if not {"steps", "epochs"} & self.model_fields_set:
            raise ValueError("steps or epochs must be given, got neither")
        fixed = {"steps", "epochs", "stages", "compile", "method"} & set(self.train)
        if fixed:
            raise ValueError(f"train must not hold {min(fixed)}, which is the run's or the stage's own")
        return self


class Train(Strict):
    """Length, batch and regularisation of the run.

    Instead of steps, epochs or stages may tell the length. trainable: patterns (regular expressions) of the
    parameters that change; none = all.
    """

    method: Literal["full"] = "full"
    steps: int = Field(1, ge=1)
    epochs: float | None = Field(None, gt=0)
    stages: tuple[StageTable, ...] = ()
    trainable: tuple[Pattern, ...] = ()
    batch_size: int = Field(ge=1)
    micro_batch_size: int | None = Field(None, ge=1)
    grad_clip: float = Field(1.0, ge=0)
    cond_dropout: float = Field(0.1, ge=0, le=1)
    gradient_checkpointing: bool = False
    compile: bool = False
    attention: Literal["auto", "sdpa", "flash"] = "auto"
    timesteps: Timesteps = Timesteps()
    exo: ExoTraining = ExoTraining()

    @model_validator(mode="after")
    def _has_length(self) -> Train:
        if not {"steps", "epochs", "stages"} & self.model_fields_set:
            raise ValueError("steps must be given, or epochs or stages, got none of them")
        if self.epochs and self.stages:
            raise ValueError(f"epochs must be left out with stages, got {self.epochs}")
        return self

    @model_validator(mode="after")
    def _micro_divides(self) -> Train:
        if self.micro_batch_size and self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"micro_batch_size must divide batch_size ({self.batch_size}), got {self.micro_batch_size}"
            )
        return self


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


class Logging(Strict):
    """What is written while training."""

    every_steps: int = Field(10, ge=1)
    tensorboard: bool = True
    plots: bool = True
    data_order: bool = False


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
