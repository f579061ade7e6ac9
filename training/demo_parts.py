"""The three runs behind `training.demo`, each with the loop, state and logging of `training.run`."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from training.config import Data, LoopConfig, PartConfig, load_config, validate
from training.data.folder import scan
from training.keys import generator
from training.launch import launch
from training.loop import Objective, Run
from training.stop import StopFlag

CONFIGS = Path(__file__).parent / "configs"
VAE_NAME, TEXT_NAME = "scenes-vae", "scenes-text"
TIMED_STEPS = 12


@dataclass(frozen=True, slots=True)
class Request:
    """What the command line asked for."""

    out: Path
    arch: str
    minutes: float | None
    assignments: tuple[str, ...]

    def part_config(self, name: str) -> PartConfig:
        """Configuration of a part's run, its paths below `out`."""
        paths = [f"datasets.{i}.path={self.out / 'scenes' / folder}" for i, folder in enumerate(("one", "two"))]
        assignments = [f"output.dir={self.out}", *paths, *self.assignments]
        return load_config(PartConfig, CONFIGS / f"{name}.yaml", assignments)


def make_vae(request: Request, stop: StopFlag) -> bool:
    """Trains the autoencoder and writes `out/scenes-vae/model.safetensors` with its latent statistics."""
    from diffusers import AutoencoderKL

    from training.objectives.autoencoder import AutoencoderObjective, latent_statistics

    config = request.part_config("demo_vae")
    count, crop = int(config.options["images"]), int(config.options["crop"])
    samples, _ = scan(config.datasets, Data())
    held_out, _ = scan([config.datasets[0].model_copy(update={"path": str(request.out / "scenes" / "held-out")})], Data())
    settings = yaml.safe_load((CONFIGS / "demo_vae_model.yaml").read_text(encoding="utf-8"))

    def build(device: torch.device, stop: StopFlag) -> AutoencoderObjective:
        torch.manual_seed(config.seed)
        return AutoencoderObjective(
            AutoencoderKL(**settings),
            samples[:: max(1, len(samples) // count)],
            held_out,
            seed=config.seed,
            batch_size=config.train.batch_size,
            crop=crop,
            device=device,
            stop=stop,
        )

    def finish(run: Run, folder: Path) -> None:
        from flowcore.vae.autoencoder import save_autoencoder
        from flowcore.vae.latent_spec import LatentSpec

        objective = run.objective
        assert isinstance(objective, AutoencoderObjective)
        with run.averaged(), torch.no_grad():
            mean, std = latent_statistics(objective)
            spec = LatentSpec(name=VAE_NAME, channels=len(mean), downscale=8, mean=tuple(mean), std=tuple(std))
            save_autoencoder(request.out / VAE_NAME / "model.safetensors", objective.autoencoder.to(torch.bfloat16), spec)
            objective.autoencoder.float()

    return launch(with_minutes(config, request, build), build, finish, stop)


def with_minutes(config: Any, request: Request, build: Any) -> Any:
    """The configuration with as many steps as fit into `--minutes`, measured on this machine.

    A run that has begun keeps the number of steps it was started with.
    """
    begun = config.folder / "config.yaml"
    if begun.exists():
        steps = yaml.safe_load(begun.read_text(encoding="utf-8"))["train"]["steps"]
    elif request.minutes is not None:
        steps = max(20, int(request.minutes * 60 / seconds_per_step(config, build)))
    else:
        return config
    table = config.model_dump(mode="json")
    table["train"]["steps"] = steps
    return validate(type(config), table, "training.demo")


def seconds_per_step(config: LoopConfig, build: Any) -> float:
    """Median seconds of a few steps on a model that is thrown away."""
    from training.launch import pick_device

    device = pick_device()
    run = Run(config, build(device, StopFlag()), device)
    times = []
    for _ in range(TIMED_STEPS):
        started = time.perf_counter()
        run.advance()
        times.append(time.perf_counter() - started)
    return sorted(times)[TIMED_STEPS // 2]
