"""Configurations: every key, every kind of mistake, in one line that names file, key, value and remedy."""

from pathlib import Path

import pytest
import yaml

from flowcore.errors import ConfigError
from tests.unit.training.workspace import run_table
from training.config import Dataset, LoopConfig, PartConfig, RunConfig, load_config
from training.config_file import key_paths

# Keys are public: a line is added here together with a key, and none is taken away.
SURFACE = """
output output.dir output.name output.dtype
seed precision
train train.method train.steps train.batch_size train.micro_batch_size train.grad_clip train.cond_dropout
train.gradient_checkpointing train.compile train.attention
train.epochs train.trainable train.teachers
train.stages train.stages.name train.stages.steps train.stages.epochs train.stages.train
train.stages.optimizer train.stages.schedule
train.exo train.exo.task train.exo.iterations train.exo.diffusion train.exo.edit train.exo.perceptual
train.exo.sparsity train.exo.labels train.exo.source train.exo.rewrite train.exo.words train.exo.features
train.exo.plain_edits train.exo.gradient train.exo.edits
train.timesteps train.timesteps.law train.timesteps.mean train.timesteps.std train.timesteps.shift
optimizer optimizer.name optimizer.lr optimizer.rule optimizer.weight_decay optimizer.betas
optimizer.groups optimizer.groups.pattern optimizer.groups.name optimizer.groups.lr optimizer.groups.rule
optimizer.groups.weight_decay optimizer.reference_lr optimizer.lr_profile
schedule schedule.name schedule.warmup_steps schedule.warmup_share schedule.steps schedule.minimum
ema ema.decay ema.warmup
checkpoint checkpoint.every_steps checkpoint.keep
sampling sampling.every_steps sampling.prompts sampling.steps sampling.cfg sampling.seed sampling.size
logging logging.every_steps logging.tensorboard logging.plots logging.data_order logging.export_batch
model model.arch model.preset model.weights model.overrides
datasets datasets.kind datasets.path datasets.caption_extension datasets.repeats datasets.edits
buckets buckets.resolution buckets.multiple buckets.max_aspect
encoders encoders.vae encoders.text
data data.on_error data.missing_caption
cache cache.dir cache.dtype
distributed distributed.strategy distributed.cpu_offload
"""
DEFAULTS = {
    "output.name": "run",
    "output.dtype": "float32",
    "seed": 0,
    "precision": "float32",
    "model.preset": "tiny",
    "buckets.max_aspect": 2.0,
    "data.on_error": "stop",
    "cache.dir": None,
    "train.grad_clip": 1.0,
    "train.cond_dropout": 0.1,
    "optimizer.name": "adamw",
    "ema.decay": None,
    "sampling.every_steps": 0,
    "checkpoint.keep": 2,
}


def write(folder: Path, text: str, name: str = "run.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def load(folder: Path, *assignments: str, **sections: object) -> RunConfig:
    path = write(folder, yaml.safe_dump(run_table(folder, **sections)))  # type: ignore[arg-type]
    return load_config(RunConfig, path, assignments)


def message(folder: Path, *assignments: str, **sections: object) -> str:
    with pytest.raises(ConfigError) as caught:
        load(folder, *assignments, **sections)
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) < 480
    return text


def value_at(config: LoopConfig, path: str) -> object:
    node: object = config
    for part in path.split("."):
        node = getattr(node, part)
    return node


def test_the_surface_is_frozen() -> None:
    assert sorted(key_paths(RunConfig)) == sorted(SURFACE.split())


def test_the_part_runs_have_the_same_keys_and_their_options() -> None:
    more = set(key_paths(PartConfig)) - set(key_paths(RunConfig))
    assert more == {"options"}


@pytest.mark.parametrize("path", DEFAULTS)
def test_defaults(path: str) -> None:
    table = {"model": {"arch": "xut"}, "datasets": [{"path": "x"}], "train": {"steps": 1, "batch_size": 1}}
    assert value_at(RunConfig.model_validate(table), path) == DEFAULTS[path]


def test_yaml_and_toml_say_the_same(tmp_path: Path) -> None:
    toml = """
seed = 3
[model]
arch = "xut"
[[datasets]]
path = "x"
[train]
steps = 5
batch_size = 2
[optimizer]
lr = 1e-3
betas = [0.9, 0.95]
"""
    yaml_text = """
seed: 3
model: {arch: xut}
datasets: [{path: x}]
train: {steps: 5, batch_size: 2}
optimizer: {lr: 1e-3, betas: [0.9, 0.95]}
cache:
"""
    first = load_config(RunConfig, write(tmp_path, toml, "a.toml"), [])
    second = load_config(RunConfig, write(tmp_path, "\ufeff" + yaml_text, "a.yaml"), [])
    assert first == second
    assert first.optimizer.lr == 1e-3


def test_a_resolved_configuration_reads_back_the_same(tmp_path: Path) -> None:
    config = load(tmp_path, "optimizer.groups=[{pattern: bias, lr: 0.1}]", "sampling.size=[64, 32]")
    again = load_config(RunConfig, write(tmp_path, yaml.safe_dump(config.model_dump(mode="json"))), [])
    assert again == config


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "configuration must be a table of sections, got NoneType"),
        (b"- 1\n", "configuration must be a table of sections, got list"),
        (b"train: [1\n", "configuration must be valid YAML or TOML"),
        (b"train: {steps: 1\xff}", "configuration must be readable UTF-8 text"),
        (b"\x00\x01", "configuration must be valid YAML or TOML"),
    ],
)
def test_a_file_that_is_no_configuration_is_named(tmp_path: Path, content: bytes, expected: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load_config(RunConfig, path, [])
    assert str(caught.value).startswith(f"{path}: {expected}")
    assert "\n" not in str(caught.value)


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"gone\.yaml: configuration must exist; no such file"):
        load_config(RunConfig, tmp_path / "gone.yaml", [])
    with pytest.raises(ConfigError, match=r"configuration must be readable UTF-8 text"):
        load_config(RunConfig, tmp_path, [])


def test_toml_that_is_none_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"a\.toml: configuration must be valid YAML or TOML"):
        load_config(RunConfig, write(tmp_path, "a = ", "a.toml"), [])


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        ({"train": {"stpes": 4}}, "unknown key train.stpes; nearest valid key is train.steps"),
        ({"trian": {"steps": 4}}, "unknown key trian; nearest valid key is train"),
        ({"datasets": [{"paht": "x"}]}, "unknown key datasets.0.paht; nearest valid key is datasets.path"),
        (
            {"optimizer": {"groups": [{"pattern": "x", "rate": 1}]}},
            "unknown key optimizer.groups.0.rate; nearest valid key is optimizer.groups",
        ),
        ({"qqq": 1}, "unknown key qqq; sections are output, seed, "),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest(
    tmp_path: Path, sections: dict[str, object], expected: str
) -> None:
    assert message(tmp_path, **sections).startswith(f"{tmp_path / 'run.yaml'}: {expected}")


def test_an_unknown_key_is_named_before_what_it_leaves_out(tmp_path: Path) -> None:
    path = write(tmp_path, "model: {arch: xut}\ndatasets: [{path: x}]\ntrian: {steps: 1, batch_size: 1}\n")
    with pytest.raises(ConfigError, match="unknown key trian"):
        load_config(RunConfig, path, [])


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        ({"train": {"steps": "many"}}, "train.steps must be a valid integer"),
        ({"train": {"steps": 0}}, "train.steps must be greater than or equal to 1, got 0"),
        ({"train": {"steps": 1.5}}, "train.steps must be a valid integer"),
        ({"train": {"steps": True}}, "train.steps must not be true or false, got True"),
        ({"train": {"steps": None}}, "train.steps must be a valid integer, got None"),
        ({"train": {"cond_dropout": 1.5}}, "train.cond_dropout must be less than or equal to 1, got 1.5"),
        ({"train": {"cond_dropout": float("nan")}}, "train.cond_dropout must be a finite number, got nan"),
        ({"train": {"stages": [{"name": "a"}]}}, "train.stages.0: steps or epochs must be given"),
        (
            {"train": {"stages": [{"steps": 1, "train": {"steps": 2}}]}},
            "train.stages.0: train must not hold steps",
        ),
        (
            {"train": {"stages": [{"steps": 1}, {"steps": 1, "optimizer": {"lr": -1}}]}},
            "configuration: train.stages.1: optimizer.lr must be greater than 0, got -1",
        ),
        (
            {"train": {"stages": [{"steps": 1, "train": {"bacth_size": 1}}]}},
            "configuration: train.stages.0: unknown key train.bacth_size; nearest valid key is train.batch_",
        ),
        (
            {"train": {"stages": [{"steps": 1}], "epochs": 2}},
            "train: epochs must be left out with stages, got 2.0",
        ),
        ({"train": {"trainable": ["("]}}, "train.trainable.0 must be a regular expression"),
        (
            {"train": {"exo": {"iterations": [3, 2]}}},
            "train.exo.iterations must be the least and the most, got [3, 2]",
        ),
        (
            {"train": {"exo": {"iterations": [1, 9]}}},
            "train.exo.iterations.1 must be less than or equal to 8",
        ),
        (
            {"optimizer": {"lr_profile": "reference"}},
            "optimizer: reference_lr must be given for lr_profile reference, got none",
        ),
        ({"train": {"micro_batch_size": 3}}, "train: micro_batch_size must divide batch_size (4), got 3"),
        (
            {"train": {"timesteps": {"law": "normal"}}},
            "train.timesteps.law must be 'logit_normal', 'uniform' or 'linear20'",
        ),
        ({"train": {"timesteps": {"shift": 0}}}, "train.timesteps.shift must be greater than 0, got 0"),
        (
            {"model": {"arch": "flux9"}},
            "model.arch must be 'xut', 'flux', 'tinyflux', 'single_stream' or 'exo', got 'flux9'",
        ),
        ({"datasets": []}, "datasets"),
        ({"datasets": {"path": "x"}}, "datasets must be a list"),
        ({"datasets": [{"repeats": 2}]}, "datasets.0.path must be given"),
        ({"datasets": [{"path": 3}]}, "datasets.0.path must be a valid string, got 3; put it in quotes"),
        (
            {"datasets": [{"path": "x", "kind": "tar"}]},
            "datasets.0.kind must be 'folder', 'trajectories' or 'latents', got 'tar'",
        ),
        ({"datasets": [{"path": "x", "caption_extension": "txt"}]}, "datasets.0.caption_extension"),
        ({"output": {"name": "a/b"}}, "output.name must be a plain folder name"),
        ({"output": {"name": ".."}}, "output.name must be a plain folder name"),
        ({"output": {"name": "con"}}, "output.name must be a plain folder name"),
        ({"output": {"name": "LPT1.x"}}, "output.name must be a plain folder name"),
        ({"output": {"name": "x."}}, "output.name must be a plain folder name"),
        (
            {"output": {"dtype": "int8"}},
            "output.dtype must be 'float32', 'bfloat16' or 'float16', got 'int8'",
        ),
        (
            {"buckets": {"resolution": 100}},
            "buckets: resolution must be a multiple of multiple (16), got 100; nearest are 96 and 112",
        ),
        (
            {"buckets": {"multiple": 12}},
            "buckets.multiple must be a multiple of 8, got 12; nearest are 8 and 16",
        ),
        (
            {"sampling": {"size": [100, 64]}},
            "sampling.size must be a multiple of 8, got 100; nearest are 96 and",
        ),
        ({"sampling": {"size": [64]}}, "sampling.size"),
        ({"optimizer": {"lr": -1}}, "optimizer.lr must be greater than 0, got -1"),
        ({"optimizer": {"lr": float("inf")}}, "optimizer.lr must be a finite number, got inf"),
        ({"optimizer": {"betas": [0.9, 1.0]}}, "optimizer.betas.1 must be less than 1, got 1.0"),
        ({"optimizer": {"name": "adam"}}, "optimizer.name must be 'adamw', 'muon' or 'sgd', got 'adam'"),
        (
            {"optimizer": {"groups": [{"pattern": "("}]}},
            "optimizer.groups.0.pattern must be a regular expression",
        ),
        ({"ema": {"decay": 1.0}}, "ema.decay must be less than 1, got 1.0"),
        (
            {"checkpoint": {"every_steps": 0}},
            "checkpoint.every_steps must be greater than or equal to 1, got 0",
        ),
        ({"checkpoint": {"keep": 0}}, "checkpoint.keep must be greater than or equal to 1, got 0"),
        ({"logging": {"every_steps": 0}}, "logging.every_steps must be greater than or equal to 1"),
        ({"data": {"on_error": "ignore"}}, "data.on_error must be 'stop' or 'skip', got 'ignore'"),
        ({"cache": {"dtype": "int4"}}, "cache.dtype must be 'float32' or 'bfloat16', got 'int4'"),
        ({"train": 5}, "train must be a table of keys, got 5"),
        ({"seed": -1}, "seed must be greater than or equal to 0, got -1"),
    ],
)
def test_a_wrong_value_is_named_with_what_is_allowed(
    tmp_path: Path, sections: dict[str, object], expected: str
) -> None:
    assert message(tmp_path, **sections).startswith(f"{tmp_path / 'run.yaml'}: {expected}")


def test_a_missing_section_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"run\.yaml: train must be given"):
        load_config(RunConfig, write(tmp_path, "model: {arch: xut}\ndatasets: [{path: x}]\n"), [])


def test_a_long_value_is_cut(tmp_path: Path) -> None:
    assert message(tmp_path, seed="x" * 1000).endswith("x...")


def test_set_takes_scalars_lists_and_items_of_lists(tmp_path: Path) -> None:
    config = load(
        tmp_path,
        "train.steps=77",
        "optimizer.betas=[0.8, 0.9]",
        "datasets.0.path=other place",
        "datasets.1.path=second",
        "datasets.1.repeats=2",
        "sampling.prompts=[a cat, 'a: dog']",
        "cache.dir=null",
        "model.overrides.tread_config.dropout_ratio=0.5",
        "optimizer.lr=1e-3",
        "output.dir=C:\\runs",
    )
    assert config.train.steps == 77
    assert config.optimizer.betas == (0.8, 0.9)
    assert [dataset.path for dataset in config.datasets] == ["other place", "second"]
    assert config.datasets[1].repeats == 2
    assert config.sampling.prompts == ("a cat", "a: dog")
    assert config.model.overrides == {"tread_config": {"dropout_ratio": 0.5}}
    assert config.optimizer.lr == 1e-3
    assert config.output.dir == "C:\\runs"


def test_set_makes_sections_and_lists_that_the_file_lacks(tmp_path: Path) -> None:
    path = write(tmp_path, "model: {arch: xut}\ntrain: {steps: 1, batch_size: 1}\n")
    config = load_config(RunConfig, path, ["datasets.0.path=x", "ema.decay=0.5"])
    assert (config.datasets[0].path, config.ema.decay) == ("x", 0.5)


@pytest.mark.parametrize(
    ("assignment", "expected"),
    [
        ("train.steps", "--set must have the form key.path=value, got 'train.steps'"),
        ("", "--set must have the form key.path=value, got ''"),
        ("trian.steps=3", "--set trian.steps: unknown key; nearest valid key is train.steps"),
        ("train.stpes=3", "--set train.stpes: unknown key; nearest valid key is train.steps"),
        ("steps=3", "--set steps: unknown key; nearest valid key is train.steps"),
        ("=3", "--set : unknown key; sections are output, "),
        ("train.steps.x=3", "--set train.steps.x: unknown key; nearest valid key is train.steps"),
        ("train.steps=x", "--set train.steps must be a valid integer"),
        ("train.steps=", "--set train.steps must be a valid integer, got None"),
        ("train.steps=[1", "--set train.steps: value must be a YAML scalar or list, got '[1'"),
        ("optimizer.betas=[2, 0.9]", "--set optimizer.betas.0 must be less than 1, got 2"),
        ("datasets.4.path=x", "--set datasets.4.path: the item must be a number from 0 to 1, got '4'"),
        ("datasets.path=x", "--set datasets.path: the item must be a number from 0 to 1, got 'path'"),
        ("train=5", "--set train must be a table of keys, got 5"),
        ("output.name=2024", "--set output.name must be a valid string, got 2024; put it in quotes"),
    ],
)
def test_set_names_the_key_as_typed(tmp_path: Path, assignment: str, expected: str) -> None:
    assert message(tmp_path, assignment).startswith(expected)


def test_set_on_a_file_with_a_value_for_a_section(tmp_path: Path) -> None:
    text = message(tmp_path, "train.steps=3", train=5)
    assert text == "--set train.steps: 'steps' must lie in a section, got 5"


def test_the_run_s_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert load(tmp_path, "output.dir=~/x", "output.name=y").folder == tmp_path / "x" / "y"


def test_a_run_must_have_a_length(tmp_path: Path) -> None:
    path = write(tmp_path, "model: {arch: xut}\ndatasets: [{path: x}]\ntrain: {batch_size: 1}\n")
    with pytest.raises(
        ConfigError, match="train: steps must be given, or epochs or stages, got none of them"
    ):
        load_config(RunConfig, path, [])
    part = write(tmp_path, "datasets: [{path: x}]\ntrain: {epochs: 1, batch_size: 1}\n")
    with pytest.raises(
        ConfigError, match=r"train\.steps must tell the length of this run, got epochs or stages"
    ):
        load_config(PartConfig, part, [])


def test_edits_of_trajectories_are_read_by_their_name_before() -> None:
    for name in ("edits", "composites"):
        assert Dataset.model_validate({"kind": "trajectories", "path": "out", name: True}).edits
