"""The training loop: the same for every objective."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from flowcore.errors import CheckpointError
from training.config import LoopConfig
from training.ema import Ema
from training.files import RunError
from training.journal import Journal, NoJournal
from training.keys import key
from training.log import plot_loss, read_metrics
from training.optim import OptimizerSet, base_lr, lr_multiplier
from training.stages import Stage, stage_at, stages_of, trained_names, warmup_steps
from training.state import Checkpoint, save_checkpoint
from training.stop import StopFlag, StoppedError
from training.strategies.plain import Strategy, own_state
from training.team import Team

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Objective(Protocol):
    """What a run minimises."""

    module: nn.Module

    def loss(self, step: int, part: slice) -> Tensor:
        """Mean loss over samples `part` of the global batch of `step` (from 0); float32, 0-d."""

    def batch_keys(self, step: int) -> tuple[str, Sequence[str]]:
        """Name of the bucket and keys of the samples of a step's global batch."""

    def preview(self, folder: Path, step: int, stop: StopFlag) -> dict[str, float]:
        """Writes samples made with the present weights; returns named measurements."""


class Run:
    """Weights, optimizer and average of one run, and the step they stand at."""

    def __init__(
        self,
        config: LoopConfig,
        objective: Objective,
        device: torch.device,
        strategy: Strategy | None = None,
    ) -> None:
        """Builds the average of all that a stage trains, and the optimizer of the first stage.

        Raises: ConfigError if patterns of a stage match no parameter, or the module cannot be spread.
        """
        self.config, self.objective, self.device = config, objective, device
        self.strategy = strategy or Strategy(Team())
        self.team = self.strategy.team
        self.module = objective.module
        self.stages = stages_of(config)
        self._trained = [set(trained_names(self.module, s.config.train.trainable)) for s in self.stages]
        self._train_only(set().union(*self._trained))
        self.strategy.spread(self.module, device)
        self.ema: Ema | None = None
        if config.ema.decay:
            self.ema = Ema(self.module, config.ema.decay, warmup=config.ema.warmup, local=self.strategy.local)
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "float16")
        self.step = 0
        self.enter(0)

    @property
    def stage(self) -> Stage:
        """The stage that the optimizer is of."""
        return self.stages[self._stage]

    def enter(self, number: int) -> None:
        """Lets what a stage trains change, and nothing else, by an optimizer without state."""
        self._stage = number
        self._train_only(self._trained[number])
        self.optimizers = OptimizerSet(self.module, self.stage.config.optimizer)
        self.strategy.enter(self.module, self.optimizers)

    def _train_only(self, names: set[str]) -> None:
        for name, parameter in self.module.named_parameters():
            parameter.requires_grad_(name in names)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Continues from a checkpoint. Raises: CheckpointError if it is of another model or optimizer."""
        try:
            self._load_weights(checkpoint.tensors("weights"))
            self.enter(checkpoint.facts.get("stage", 0))
            self.strategy.load_optimizer(self.module, self.optimizers, checkpoint.tensors("optimizer"))
            if self.ema:
                average = {
                    name: self.strategy.shard(tensor, self.module.get_parameter(name))
                    for name, tensor in checkpoint.tensors("ema").items()
                }
                self.ema.load(average, checkpoint.facts["ema_updates"])
            if self.scaler.is_enabled():
                self.scaler.load_state_dict({k: v.item() for k, v in checkpoint.tensors("scaler").items()})
        except (RuntimeError, LookupError, ValueError, OSError) as err:
            raise CheckpointError(
                f"{checkpoint.path} must be of this configuration, got another's ({str(err)[:200]})"
            ) from err
        self.step = checkpoint.step

    def _load_weights(self, tensors: dict[str, Tensor]) -> None:
        """Puts back what `own_state` gave. Raises: LookupError, RuntimeError for other names or shapes."""
        differing = sorted(tensors.keys() ^ own_state(self.module).keys())
        if differing:
            raise LookupError(f"tensor {differing[0]}")
        self.strategy.load(self.module, tensors)

    def weights(self) -> dict[str, Tensor]:
        """The module's whole state; in the first process alone if it is spread."""
        return self.strategy.full(self.strategy.state(self.module), self.module)

    def average(self) -> dict[str, Tensor]:
        """The whole average, none if there is none; in the first process alone if it is spread."""
        return self.strategy.full(self.ema.average, self.module) if self.ema else {}

    def save(self, folder: Path) -> None:
        """Writes `folder/checkpoints/step-NNNNNNNN` for the present step."""
        own = own_state(self.module).keys()
        held = {name: part for name, part in self.strategy.state(self.module).items() if name in own}
        parts = {
            "weights": self.strategy.full(held, self.module),
            "optimizer": self.strategy.optimizer_state(self.module, self.optimizers),
        }
        if self.ema:
            parts["ema"] = self.average()
        if self.scaler.is_enabled():
            parts["scaler"] = {k: torch.tensor(v) for k, v in self.scaler.state_dict().items()}
        facts = {
            "ema_updates": self.ema.updates if self.ema else 0,
            "stage": self._stage,
            "stage_first_step": self.stage.first,
        }
        keep = self.config.checkpoint.keep

        def write() -> None:
            save_checkpoint(folder / "checkpoints", self.step, parts, facts, keep)

        self.team.lead(write)

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """The module with its averaged weights (if it has any), in evaluation mode."""
        if self.ema:
            self.ema.swap()
        self.module.eval()
        try:
            yield
        finally:
            self.module.train()
            if self.ema:
                self.ema.swap()

    def advance(self) -> dict[str, float]:
        """One optimizer step over the global batch.

        Raises: RunError if the loss or the gradient is not finite; weights are then those of the step before.
        """
        started = time.perf_counter()
        if self._stage != stage_at(self.stages, self.step):
            self.enter(stage_at(self.stages, self.step))
        config = self.stage.config
        ranks = (self.team.rank,) if self.team.rank else ()
        torch.manual_seed(key(self.config.seed, "model", self.step, *ranks))
        loss = self._backward()
        if not math.isfinite(loss):
            raise self._failure(f"loss must be finite, got {loss}")
        multiplier = self.multiplier(self.step)
        grad_norm = self.strategy.update(
            self.module, self.optimizers, multiplier, self.scaler, config.train.grad_clip or math.inf
        )
        if not math.isfinite(grad_norm) and not self.scaler.is_enabled():
            raise self._failure(f"gradient must be finite, got norm {grad_norm}")
        if self.ema:
            self.ema.update()
        self.step += 1
        return {
            "step": self.step,
            "loss": loss,
            "lr": base_lr(config.optimizer) * multiplier,
            "grad_norm": grad_norm,
            "seconds": time.perf_counter() - started,
        }

    def multiplier(self, step: int) -> float:
        """Learning-rate factor of a step of the present stage."""
        config = self.stage.config
        schedule = config.schedule
        return lr_multiplier(
            schedule.name,
            step - self.stage.first,
            steps=schedule.steps or config.train.steps,
            warmup_steps=warmup_steps(config),
            minimum=schedule.minimum,
        )

    def _failure(self, what: str) -> Exception:
        return self.team.shared(RunError(f"step {self.step + 1}: {what}; lower optimizer.lr"))

    def _backward(self) -> float:
        """Gradients of the global batch, micro-batch by micro-batch; returns the mean loss."""
        train = self.stage.config.train
        own = self.team.part(train.batch_size)
        count = own.stop - own.start
        micro = train.micro_batch_size or count
        total = torch.zeros((), device=self.device)
        for first in range(own.start, own.stop, micro):
            part = slice(first, min(first + micro, own.stop))

            def loss(part: slice = part) -> Tensor:
                with self.autocast():
                    share = (part.stop - part.start) / count
                    weighted: Tensor = self.objective.loss(self.step, part) * share
                    return weighted

            total += self.strategy.backward(loss, self.scaler, is_last=part.stop == own.stop)
        return float(self.team.mean(total))

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """Mixed precision of the run; parameters stay float32."""
        if self.config.precision == "float32":
            return contextlib.nullcontext()
        dtype = DTYPES[self.config.precision]
        return torch.autocast(self.device.type, dtype, cache_enabled=self.strategy.keeps_casts)


def train(run: Run, folder: Path, stop: StopFlag) -> bool:
    """Trains from the run's present step to the last; False if a stop came first.

    Saves at the interval, at the end and at a stop, so that the same command continues exactly.
    """
    config = run.config
    stopped = run.team.stop(stop)
    with (Journal if run.team.is_first else NoJournal)(config, folder, run.step) as journal:
        saved = run.step
        while run.step < config.train.steps and not stopped:
            row = run.advance()
            journal.step(row, run.objective)
            if _due(run.step, config.checkpoint.every_steps, config.train.steps):
                run.save(folder)
                saved = run.step
                journal.saved(saved)
            every = config.sampling.every_steps
            if every and _due(run.step, every, config.train.steps):
                with contextlib.suppress(StoppedError):
                    journal.scalars(_preview(run, folder, stop), run.step)
        if saved != run.step:
            run.save(folder)
    if config.logging.plots and run.team.is_first and read_metrics(folder / "metrics.csv"):
        plot_loss([folder], folder / "plots" / "loss.png")
    return run.step >= config.train.steps


def _due(step: int, every: int, last: int) -> bool:
    return step % every == 0 or step == last


def _preview(run: Run, folder: Path, stop: StopFlag) -> dict[str, float]:
    samples = folder / "samples"
    samples.mkdir(exist_ok=True)

    def draw(place: Path, flag: StopFlag) -> dict[str, float]:
        return run.objective.preview(place, run.step, flag)

    with run.averaged(), torch.no_grad():
        return run.strategy.sample(draw, samples, stop)
