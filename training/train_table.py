"""The section `train` of a run: length, stages, batch, noise levels, and what exo minimises."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from training.strict import Pattern, Strict


class Timesteps(Strict):
    """Law of the training noise levels (flow.md 4.1), 1 = noise.

    linear20: one of the 20 levels 0, 1/19, ..., 1, as the description of Exo has it.
    """

    law: Literal["logit_normal", "uniform", "linear20"] = "logit_normal"
    mean: float = 0.0
    std: float = Field(1.0, gt=0)
    shift: float = Field(1.0, gt=0)


class ExoTraining(Strict):
    """What a run of exo minimises (exo.md 10); other architectures do not read it.

    task: velocity; projector = the picture's latents from its visual tokens; language = words from the states
    of the trunk's own text; rewrite = what an edit shows, in words, from its source and its instruction, for
    models that rewrite; masks = the known labels of edits alone. The weights diffusion, edit and perceptual
    are those of the three losses; of the edit loss, sparsity is the price of a marked cell and labels the
    weight of the cells' known labels. source: of the latents of the picture that is looked at from its visual
    tokens, where velocity (of edits) or rewriting is learned; rewrite: of the words for edits, where velocity
    is learned; words: of the captions' words, and of where they stand, from visual tokens, where the
    projector is learned.
    iterations: least and most, drawn for each step; gradient: whether it runs through all of them or each
    learns for itself, which costs less. features: what the perceptual loss compares. edits: whether
    velocity is learned from edits, too. plain_edits: whether samples without source picture have an edit
    loss, against the estimate of the first iteration.
    """

    task: Literal["velocity", "projector", "language", "rewrite", "masks"] = "velocity"
    iterations: tuple[Annotated[int, Field(ge=1, le=8)], Annotated[int, Field(ge=1, le=8)]] = (1, 4)
    gradient: Literal["all", "own"] = "all"
    diffusion: float = Field(0.9, ge=0)
    edit: float = Field(0.1, ge=0)
    perceptual: float = Field(0.05, ge=0)
    sparsity: float = Field(0.1, gt=0)
    labels: float = Field(0.2, ge=0)
    source: float = Field(0.0, ge=0)
    rewrite: float = Field(0.0, ge=0)
    words: float = Field(0.0, ge=0)
    features: Literal["decoder_mid", "lpips", "none"] = "decoder_mid"
    edits: bool = True
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
    parameters that change; none = all. teachers: model files or bundled names of the same latent space; the
    mean of their velocities is learned instead of the data's, but for edits.
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
    teachers: tuple[str, ...] = ()
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
