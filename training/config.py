"""Everything a run can be told: strict tables, read from YAML or TOML, overridden by `--set`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path, PureWindowsPath
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from flowcore.errors import ConfigError
from training.config_file import assign, describe, read_table

CELL = 8
"""Pixels of an image that one latent cell stands for, on a side."""

Beta = Annotated[float, Field(ge=0, lt=1)]
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

    arch: Literal["xut", "flux", "tinyflux", "single_stream"]
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
    """VAE and text encoder: bundled name, folder or file; `pixels` and `bytes` need no weights."""

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


class Train(Strict):
    """Length, batch and regularisation of the run."""

    method: Literal["full"] = "full"
    steps: int = Field(ge=1)
    batch_size: int = Field(ge=1)
    micro_batch_size: int | None = Field(None, ge=1)
    grad_clip: float = Field(1.0, ge=0)
    cond_dropout: float = Field(0.1, ge=0, le=1)
    gradient_checkpointing: bool = False
    compile: bool = False
    attention: Literal["auto", "sdpa", "flash"] = "auto"
    timesteps: Timesteps = Timesteps()

    @model_validator(mode="after")
    def _micro_divides(self) -> Train:
        if self.micro_batch_size and self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"micro_batch_size must divide batch_size ({self.batch_size}), got {self.micro_batch_size}"
            )
        return self


class Group(Strict):
    """Parameters whose name contains `pattern` (a regular expression), with settings of their own."""

    pattern: str
    name: Literal["adamw", "muon", "sgd"] | None = None
    lr: float | None = Field(None, gt=0)
    rule: Literal["constant", "fan_in"] | None = None
    weight_decay: float | None = Field(None, ge=0)

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str) -> str:
        try:
            re.compile(pattern)
        except re.error as err:
            raise ValueError(f"must be a regular expression ({err})") from err
        return pattern


class Optimizer(Strict):
    """Optimizer; the first group whose pattern matches a parameter decides over it."""

    name: Literal["adamw", "muon", "sgd"] = "adamw"
    lr: float = Field(1e-4, gt=0)
    rule: Literal["constant", "fan_in"] = "constant"
    weight_decay: float = Field(0.01, ge=0)
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    groups: tuple[Group, ...] = ()


class Schedule(Strict):
    """Multiplier of every learning rate over the steps."""

    name: Literal["constant", "linear", "cosine"] = "cosine"
    warmup_steps: int = Field(0, ge=0)
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

    @property
    def folder(self) -> Path:
        """Folder that holds everything of the run."""
        return Path(self.output.dir).expanduser() / self.output.name


class RunConfig(LoopConfig):
    """A run of `training.run`: a flow-matching model on folders of captioned images."""

    model: Model
    datasets: tuple[Dataset, ...] = Field(min_length=1)
    buckets: Buckets = Buckets()
    encoders: Encoders = Encoders()
    data: Data = Data()
    cache: Cache = Cache()


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
