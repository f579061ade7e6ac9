"""The training loop: the same for every objective."""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from tqdm import tqdm

from flowcore.errors import CheckpointError
from training.config import LoopConfig
from training.ema import Ema
from training.files import RunError
from training.keys import key
from training.log import ORDER_COLUMNS, CsvLog, MetricLog, plot_loss, read_metrics, write_status
from training.optim import OptimizerSet, base_lr, lr_multiplier
from training.stages import Stage, stage_at, stages_of, trained_names, warmup_steps
from training.state import Checkpoint, save_checkpoint
from training.stop import StopFlag, StoppedError

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


@runtime_checkable
class Refers(Protocol):
    """A module that uses a network whose weights belong to files of their own."""

    def own_state(self) -> dict[str, Tensor]:
        """The tensors that are not the other network's."""


def own_state(module: nn.Module) -> dict[str, Tensor]:
    """The tensors of a module that a checkpoint holds."""
    return module.own_state() if isinstance(module, Refers) else module.state_dict()


class Run:
    """Weights, optimizer and average of one run, and the step they stand at."""

    def __init__(self, config: LoopConfig, objective: Objective, device: torch.device) -> None:
        """Builds the average of all that a stage trains, and the optimizer of the first stage.

        Raises: ConfigError if patterns of a stage match no parameter.
        """
        self.config, self.objective, self.device = config, objective, device
        self.module = objective.module
        self.stages = stages_of(config)
        self._trained = [set(trained_names(self.module, s.config.train.trainable)) for s in self.stages]
        self._train_only(set().union(*self._trained))
        self.ema = Ema(self.module, config.ema.decay, warmup=config.ema.warmup) if config.ema.decay else None
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "float16")
        self.step = 0
        self._enter(0)

    @property
    def stage(self) -> Stage:
        """The stage that the optimizer is of."""
        return self.stages[self._stage]

    def _enter(self, number: int) -> None:
        """Lets what a stage trains change, and nothing else, by an optimizer without state."""
        self._stage = number
        self._train_only(self._trained[number])
        self.optimizers = OptimizerSet(self.module, self.stage.config.optimizer)

    def _train_only(self, names: set[str]) -> None:
        for name, parameter in self.module.named_parameters():
            parameter.requires_grad_(name in names)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Continues from a checkpoint. Raises: CheckpointError if it is of another model or optimizer."""
        try:
            self._enter(checkpoint.facts.get("stage", 0))
            self._load_weights(checkpoint.tensors("weights"))
            self.optimizers.load_state_tensors(checkpoint.tensors("optimizer"))
            if self.ema:
                self.ema.load(checkpoint.tensors("ema"), checkpoint.facts["ema_updates"])
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
        self.module.load_state_dict({**self.module.state_dict(), **tensors})

    def save(self, folder: Path) -> None:
        """Writes `folder/checkpoints/step-NNNNNNNN` for the present step."""
        parts = {"weights": own_state(self.module), "optimizer": self.optimizers.state_tensors()}
        if self.ema:
            parts["ema"] = self.ema.average
        if self.scaler.is_enabled():
            parts["scaler"] = {k: torch.tensor(v) for k, v in self.scaler.state_dict().items()}
        facts = {
            "ema_updates": self.ema.updates if self.ema else 0,
            "stage": self._stage,
            "stage_first_step": self.stage.first,
        }
        save_checkpoint(folder / "checkpoints", self.step, parts, facts, self.config.checkpoint.keep)

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
            self._enter(stage_at(self.stages, self.step))
        config = self.stage.config
        torch.manual_seed(key(self.config.seed, "model", self.step))
        loss = self._backward()
        if not math.isfinite(loss):
            raise RunError(f"step {self.step + 1}: loss must be finite, got {loss}; lower optimizer.lr")
        for optimizer in self.optimizers.optimizers:
            self.scaler.unscale_(optimizer)
        clip = config.train.grad_clip or math.inf
        grad_norm = float(nn.utils.clip_grad_norm_(self.module.parameters(), clip))
        if not math.isfinite(grad_norm) and not self.scaler.is_enabled():
            raise RunError(
                f"step {self.step + 1}: gradient must be finite, got norm {grad_norm}; lower optimizer.lr"
            )
        multiplier = self.multiplier(self.step)
        self.optimizers.step(multiplier, self.scaler)
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

    def _backward(self) -> float:
        """Gradients of the global batch, micro-batch by micro-batch; returns the mean loss."""
        train = self.stage.config.train
        batch = train.batch_size
        micro = train.micro_batch_size or batch
        total = torch.zeros((), device=self.device)
        for first in range(0, batch, micro):
            part = slice(first, min(first + micro, batch))
            with self.autocast():
                loss = self.objective.loss(self.step, part) * ((part.stop - part.start) / batch)
            torch.autograd.backward(self.scaler.scale(loss))
            total += loss.detach()
        return float(total)

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """Mixed precision of the run; parameters stay float32."""
        if self.config.precision == "float32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, DTYPES[self.config.precision])


def train(run: Run, folder: Path, stop: StopFlag) -> bool:
    """Trains from the run's present step to the last; False if a stop came first.

    Saves at the interval, at the end and at a stop, so that the same command continues exactly.
    """
    config = run.config
    order = (
        CsvLog(folder / "data_order.csv", ORDER_COLUMNS, run.step + 1) if config.logging.data_order else None
    )
    with MetricLog(folder, run.step + 1, tensorboard=config.logging.tensorboard) as log:
        write_status(folder, "running", run.step)
        with tqdm(
            total=config.train.steps, initial=run.step, desc=config.output.name, unit="step", file=sys.stderr
        ) as bar:
            saved = run.step
            while run.step < config.train.steps and not stop:
                row = run.advance()
                bar.update()
                if order:
                    bucket, keys = run.objective.batch_keys(run.step - 1)
                    order.append([str(run.step), bucket, ";".join(" ".join(key.split()) for key in keys)])
                _report(run, row, log, bar)
                if _due(run.step, config.checkpoint.every_steps, config.train.steps):
                    run.save(folder)
                    saved = run.step
                    write_status(folder, "running", run.step)
                every = config.sampling.every_steps
                if every and _due(run.step, every, config.train.steps):
                    with contextlib.suppress(StoppedError):
                        _preview(run, folder, log, stop)
            if saved != run.step:
                run.save(folder)
    if config.logging.plots and read_metrics(folder / "metrics.csv"):
        plot_loss([folder], folder / "plots" / "loss.png")
    return run.step >= config.train.steps


def _due(step: int, every: int, last: int) -> bool:
    return step % every == 0 or step == last


def _report(run: Run, row: dict[str, float], log: MetricLog, bar: tqdm[NoReturn]) -> None:
    if _due(run.step, run.config.logging.every_steps, run.config.train.steps):
        log.write(row)
        bar.set_postfix(loss=f"{row['loss']:.4f}", refresh=False)


def _preview(run: Run, folder: Path, log: MetricLog, stop: StopFlag) -> None:
    samples = folder / "samples"
    samples.mkdir(exist_ok=True)
    with run.averaged(), torch.no_grad():
        values = run.objective.preview(samples, run.step, stop)
    log.scalars(values, run.step)
