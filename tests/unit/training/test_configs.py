"""The configurations that come with the trainer: each is valid, fits its model, and the small one runs."""

from pathlib import Path

import pytest
import yaml

from tests.support import ROOT
from tests.unit.training.workspace import run, settings, tree, write_images
from training.assemble import prepare_model
from training.config import LoopConfig, PartConfig, RunConfig, load_config
from training.optim import plan_groups
from training.stages import stages_of, trained_names

FOLDER = ROOT / "training" / "configs"
PARTS = {"demo_vae": PartConfig, "demo_vae_decoder": PartConfig, "demo_text": PartConfig}
NO_RUNS = {"demo_vae_model"}
NAMES = sorted(path.stem for path in FOLDER.glob("*.yaml"))
RUNS = [name for name in NAMES if name not in {*PARTS, *NO_RUNS}]
WITHOUT_WEIGHTS = [
    "model.preset=tiny",
    "encoders={vae: pixels, text: bytes}",
    "optimizer.name=adamw",
    "optimizer.groups=[]",
]


@pytest.mark.parametrize("name", [name for name in NAMES if name not in NO_RUNS])
def test_it_is_valid_and_says_what_it_is_for(name: str) -> None:
    kind: type[LoopConfig] = PARTS.get(name, RunConfig)
    config = load_config(kind, FOLDER / f"{name}.yaml", [])
    assert config.output.name in name
    assert (FOLDER / f"{name}.yaml").read_text(encoding="utf-8").startswith("# ")


@pytest.mark.parametrize("name", RUNS)
def test_its_sizes_and_parameter_groups_fit_its_model(name: str) -> None:
    config = load_config(RunConfig, FOLDER / f"{name}.yaml", [])
    architecture, model_config = prepare_model(config)
    model = architecture.model(model_config, device="meta")
    for stage in stages_of(config):
        names = trained_names(model, stage.config.train.trainable)
        plans = plan_groups([(name, model.get_parameter(name)) for name in names], stage.config.optimizer)
        assert sum(len(plan.names) for plan in plans) == len(names)


@pytest.mark.parametrize("name", RUNS)
def test_its_plan_can_be_made_for_a_tiny_model(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_images(tmp_path / "images", 4)
    paths = [
        f"datasets=[{{path: '{folder.as_posix()}'}}]",
        f"output.dir={tmp_path / 'runs'}",
        "cache.dir=null",
    ]
    overrides = "{lora_rank: 2}" if name.startswith("exo") else "{}"
    changes = [*paths, *WITHOUT_WEIGHTS, f"model.overrides={overrides}"]
    before = tree(tmp_path)
    assert run(FOLDER / f"{name}.yaml", "--dry-run", *settings(*changes)) == 0
    assert "4 images" in capsys.readouterr().out
    assert tree(tmp_path) == before


def test_the_tiny_one_needs_nothing_but_images(tmp_path: Path) -> None:
    images = write_images(tmp_path / "images", 10, [(64, 64), (80, 40)])
    changes = [f"datasets.0.path={images}", f"output.dir={tmp_path}", "train.steps=2"]
    plain = ["logging.plots=false", "logging.tensorboard=false", "sampling.every_steps=0"]
    assert run(FOLDER / "xut_tiny.yaml", *settings(*changes, *plain)) == 0
    assert (tmp_path / "xut_tiny" / "final" / "ema.safetensors").exists()


def test_the_small_tables_are_yaml() -> None:
    for name in NO_RUNS:
        assert yaml.safe_load((FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))
