"""What a run of `training.sequences` can be told besides what every run can."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from training.config import LoopConfig
from training.strict import Strict


class SequenceModel(Strict):
    """Sizes of the Flux; the widths of tokens follow from the spaces."""

    preset: str = "points"
    overrides: dict[str, Any] = Field(default_factory=dict)


class Times(Strict):
    """Beta law of the training noise levels, 1 = noise."""

    alpha: float = Field(2.5, gt=0, le=100)
    beta: float = Field(2.0, gt=0, le=100)


class Scoring(Strict):
    """Held-out pairs that are sampled and measured, and [lowest, highest] of each measurement, null = any."""

    count: int = Field(256, ge=2)
    limits: dict[str, tuple[float | None, float | None]] = Field(default_factory=dict)


class SequenceConfig(LoopConfig):
    """A run of `training.sequences`: pairs of a condition and data, each in a space of its own.

    task: a drawn task (curves, rings), or a .safetensors or .npz file with `condition` and `data`, a sample a
    row, and with `source` for `source: paired`. condition, data: kind and fields of a codec (flowcore.flux).
    source: where the path to the data begins, in noise or in the file's `source`, samples of the data space.
    """

    model: SequenceModel = SequenceModel()
    task: str
    condition: dict[str, Any]
    data: dict[str, Any]
    source: Literal["noise", "paired"] = "noise"
    times: Times = Times()
    scoring: Scoring = Scoring()

    @model_validator(mode="after")
    def _only_what_counts(self) -> SequenceConfig:
        if "timesteps" in self.train.model_fields_set:
            raise ValueError("train.timesteps must be left out of a sequence run; set times")
        unused = self.sampling.model_fields_set & {"prompts", "size"}
        if unused:
            raise ValueError(
                f"sampling.{min(unused)} must be left out of a sequence run, which has no pictures"
            )
        return self
