"""Everything a run can be told: strict tables, read from YAML or TOML, overridden by `--set`."""

from __future__ import annotations

import difflib
import re
import sys
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from flowcore.errors import ConfigError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Precision = Literal["float32", "bfloat16", "float16"]


class Strict(BaseModel):
    """Table without unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Output(Strict):
    """Where the run's folder lies and how its final weights are stored."""

    dir: str = "runs"
    name: str = "run"
    dtype: Precision = "float32"

    @field_validator("name")
    @classmethod
    def _plain(cls, name: str) -> str:
        if not re.fullmatch(r"[\w.-]+", name) or name.startswith("."):
            raise ValueError("must be a plain folder name of letters, digits, '-', '_' and '.'")
        return name


class Model(Strict):
    """Architecture, its sizes, and weights to start from."""

    arch: Literal["xut"]
    preset: str = "tiny"
    weights: str | None = None
    overrides: dict[str, Any] = Field(default_factory=dict)


class Dataset(Strict):
    """One folder of images, each with a caption file of the same name."""

    kind: Literal["folder"] = "folder"
    path: str
    caption_extension: str = Field(".txt", pattern=r"^\.\w+$")
    repeats: int = Field(1, ge=1)


class Buckets(Strict):
    """Picture sizes in pixels."""

    resolution: int = Field(256, ge=16, le=8192)
    multiple: int = Field(16, ge=8, le=512)
    max_aspect: float = Field(2.0, ge=1.0, le=8.0)

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
    betas: tuple[float, float] = (0.9, 0.999)
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
    cfg: float = Field(3.0, ge=0)
    seed: int = Field(0, ge=0)
    size: tuple[int, int] | None = None


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
        return Path(self.output.dir) / self.output.name


class RunConfig(LoopConfig):
    """A run of `training.run`: a flow-matching model on folders of captioned images."""

    model: Model
    datasets: tuple[Dataset, ...] = Field(min_length=1)
    buckets: Buckets = Buckets()
    encoders: Encoders = Encoders()
    data: Data = Data()
    cache: Cache = Cache()

    @model_validator(mode="after")
    def _encoders_named(self) -> RunConfig:
        for key, value in (("vae", self.encoders.vae), ("text", self.encoders.text)):
            if value is None and self.model.preset != "tiny":
                raise ValueError(f"encoders.{key} must be named for preset {self.model.preset!r}")
        return self


class PartConfig(LoopConfig):
    """A run that makes one of the demo's own parts, autoencoder or text encoder, from the same folders."""

    datasets: tuple[Dataset, ...] = Field(min_length=1)
    options: dict[str, float] = Field(default_factory=dict)


ConfigT = TypeVar("ConfigT", bound=LoopConfig)


def load_config(kind: type[ConfigT], path: Path, assignments: list[str]) -> ConfigT:
    """Validated configuration from a YAML or TOML file and `key.path=value` assignments.

    Raises: ConfigError in one line that names file, key, the value got and what is allowed.
    """
    table = _read_table(path)
    for assignment in assignments:
        _assign(kind, table, assignment)
    return validate(kind, table, str(path))


def validate(kind: type[ConfigT], table: dict[str, Any], source: str) -> ConfigT:
    """Configuration from a table; errors name `source` and the key."""
    try:
        return kind.model_validate(table)
    except ValidationError as err:
        raise ConfigError(f"{source}: {_describe(kind, err)}") from err


def _read_table(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as err:
        raise ConfigError(f"{path}: configuration must exist; no such file") from err
    except (OSError, UnicodeDecodeError) as err:
        raise ConfigError(f"{path}: configuration must be readable UTF-8 text ({err})") from err
    try:
        table = tomllib.loads(text) if path.suffix.lower() == ".toml" else yaml.safe_load(text)
    except (yaml.YAMLError, tomllib.TOMLDecodeError) as err:
        reason = " ".join(str(err).split())[:200]
        raise ConfigError(f"{path}: configuration must be valid YAML or TOML ({reason})") from err
    if not isinstance(table, dict):
        raise ConfigError(f"{path}: configuration must be a table of sections, got {type(table).__name__}")
    return table


def _assign(kind: type[LoopConfig], table: dict[str, Any], assignment: str) -> None:
    name, equals, text = assignment.partition("=")
    if not equals:
        raise ConfigError(f"--set must have the form key.path=value, got {assignment!r}")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as err:
        raise ConfigError(f"--set {name}: value must be a YAML scalar or list, got {text!r}") from err
    *parents, last = name.split(".")
    node: Any = table
    for part in parents:
        node = _child(node, part, name, kind)
    _put(node, last, value, name, kind)


def _child(node: Any, part: str, name: str, kind: type[LoopConfig]) -> Any:
    if isinstance(node, list):
        return node[_index(node, part, name)]
    if not isinstance(node, dict):
        raise ConfigError(f"--set {name}: {part!r} must lie in a section{_suggest(kind, name)}")
    if node.get(part) is None:
        node[part] = {}
    return node[part]


def _put(node: Any, last: str, value: Any, name: str, kind: type[LoopConfig]) -> None:
    if isinstance(node, list):
        node[_index(node, last, name)] = value
    elif isinstance(node, dict):
        node[last] = value
    else:
        raise ConfigError(f"--set {name}: {last!r} must lie in a section{_suggest(kind, name)}")


def _index(node: list[Any], part: str, name: str) -> int:
    if not part.isdigit() or int(part) >= len(node):
        raise ConfigError(f"--set {name}: {part!r} must be a number below {len(node)}")
    return int(part)


def _describe(kind: type[LoopConfig], err: ValidationError) -> str:
    """First problem of a validation error in one line."""
    problem = err.errors()[0]
    name = ".".join(str(part) for part in problem["loc"]) or "configuration"
    if problem["type"] == "extra_forbidden":
        return f"unknown key {name}{_suggest(kind, name)}"
    if problem["type"] == "missing":
        return f"{name} must be given"
    message = problem["msg"].removeprefix("Value error, ")
    got = "" if isinstance(problem["input"], (dict, BaseModel)) else f", got {problem['input']!r}"
    return f"{name}: {message}{'' if 'got' in message else got}"[:400]


def _suggest(kind: type[LoopConfig], name: str) -> str:
    """The nearest valid key, as the end of a sentence."""
    plain = re.sub(r"\.\d+(?=\.|$)", "", name)
    near = difflib.get_close_matches(plain, key_paths(kind), n=1, cutoff=0.4)
    return f"; nearest valid key is {near[0]}" if near else ""


def key_paths(kind: type[BaseModel], prefix: str = "") -> list[str]:
    """Every key of a configuration as a dotted path (items of lists without their number)."""
    paths = []
    for name, field in kind.model_fields.items():
        paths.append(prefix + name)
        for table in _tables(field.annotation):
            paths += key_paths(table, f"{prefix}{name}.")
    return paths


def _tables(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [table for part in get_args(annotation) for table in _tables(part)]
