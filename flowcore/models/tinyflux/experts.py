"""Lune and Sol: two small predictors that imitate features of two teachers, and what the features do.

A teacher's own features may take the place of a prediction, sample by sample. Inference needs none. All is
computed in float32.
Source: AbstractEyes/tiny-flux, version 4.2.
"""

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from ...errors import ShapeError
from ...layers.norm import FloatLayerNorm, at_use
from ...ops import Ops
from .config import TinyFluxConfig

_HEAD_SPREAD = 0.2
_MIN_TEMPERATURE = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class LuneOutput:
    """What Lune adds to the condition `b d`, and what it predicted of the teacher's features `b k`."""

    signal: Tensor
    predicted: Tensor
    has_teacher: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class SolOutput:
    """How Sol steers attention, and what it predicted of the teacher's maps; all float32.

    Shapes: temperature `b nh`; importance and predicted_spatial `b s s`; predicted_stats `b 3` (locality,
    entropy, clustering).
    """

    temperature: Tensor
    importance: Tensor
    predicted_stats: Tensor
    predicted_spatial: Tensor


class LunePredictor(nn.Module):
    """A vector for the condition, from the inner features of a diffusion teacher or a guess at them."""

    def __init__(self, config: TinyFluxConfig, *, ops: Ops, device: torch.device | str | None = None) -> None:
        super().__init__()
        dim, hidden = config.hidden_size, config.lune_hidden_dim
        self.dropout = config.lune_dropout
        self.input_proj = ops.float_linear(dim + config.pooled_projection_dim, hidden, device=device)
        self.predictor = nn.Sequential(
            nn.SiLU(),
            ops.float_linear(hidden, hidden, device=device),
            nn.SiLU(),
            nn.Identity(),  # the place of the dropout, whose randomness comes from outside
            ops.float_linear(hidden, hidden, device=device),
            nn.SiLU(),
            ops.float_linear(hidden, config.lune_expert_dim, device=device),
        )
        self.output_proj = nn.Sequential(
            FloatLayerNorm(config.lune_expert_dim, device=device),
            ops.float_linear(config.lune_expert_dim, dim, device=device),
        )
        self.expert_gate = nn.Parameter(torch.zeros((), device=device))

    def forward(
        self,
        z: Tensor,
        features: Tensor | None = None,
        present: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> LuneOutput:
        """Return what to add to the condition, and the prediction.

        Args:
            z: time and text `b k`, float32.
            features: the teacher's `b k`; None = the prediction.
            present: `b` boolean, which samples have the teacher's features; None = all.
            generator: source of the dropout in training.

        Raises: ShapeError in training with dropout but no generator.
        """
        hidden = self.predictor[:3](self.input_proj(z))
        predicted: Tensor = self.predictor[4:](self._drop(hidden, generator))
        used = _choose(features, predicted, present)
        signal = at_use(self.expert_gate, z).sigmoid() * self.output_proj(used)
        return LuneOutput(signal=signal, predicted=predicted, has_teacher=features is not None)

    def _drop(self, hidden: Tensor, generator: torch.Generator | None) -> Tensor:
        if not self.training or self.dropout == 0:
            return hidden
        if generator is None:
            raise ShapeError(
                f"generator must be given when Lune drops out, got None with lune_dropout {self.dropout}"
            )
        draw = torch.rand(hidden.shape, generator=generator, device=generator.device)
        return hidden * (draw >= self.dropout).to(hidden.device) / (1 - self.dropout)


class SolPrior(nn.Module):
    """A temperature for attention and a map of where images are important.

    Both come from statistics of a teacher's attention, or a guess at them, mixed with a formula of the time.
    """

    def __init__(self, config: TinyFluxConfig, *, ops: Ops, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.heads, self.side = config.num_attention_heads, config.sol_spatial_size
        hidden = config.sol_hidden_dim
        given = config.hidden_size + config.pooled_projection_dim

        def predictor(num_outputs: int) -> nn.Sequential:
            return nn.Sequential(
                ops.float_linear(given, hidden, device=device),
                nn.SiLU(),
                ops.float_linear(hidden, hidden, device=device),
                nn.SiLU(),
                ops.float_linear(hidden, num_outputs, device=device),
            )

        self.stat_predictor = predictor(3)
        self.spatial_predictor = predictor(self.side**2)
        self.stat_to_temperature = nn.Sequential(
            ops.float_linear(3, hidden // 2, device=device),
            nn.SiLU(),
            ops.float_linear(hidden // 2, self.heads, device=device),
        )
        # Files own this layer and no forward uses it.
        self.spatial_to_qk_scale = (
            ops.float_linear(1, self.heads, device=device) if config.sol_qk_scale else None
        )
        share = min(max(config.sol_geometric_weight, 1e-4), 1 - 1e-4)
        self.blend_gate = nn.Parameter(torch.logit(torch.tensor(share)).to(device))

    def forward(
        self,
        z: Tensor,
        times: Tensor,
        stats: Tensor | None = None,
        spatial: Tensor | None = None,
        present: Tensor | None = None,
    ) -> SolOutput:
        """Return how attention is steered, and the predictions.

        Args:
            z: time and text `b k`, float32.
            times: `b`, 0 = noise, 1 = data, float32.
            stats: the teacher's `b 3`; None = the prediction.
            spatial: the teacher's map `b s s`; None = the prediction.
            present: `b` boolean, which samples have the teacher's values; None = all.
        """
        predicted_stats = self.stat_predictor(z)
        cells = torch.sigmoid(self.spatial_predictor(z).float())
        predicted_spatial = rearrange(cells, "b (h w) -> b h w", h=self.side)
        used_stats = _choose(stats, predicted_stats, present)
        learned = functional.softplus(self.stat_to_temperature(used_stats).float())
        share = at_use(self.blend_gate, z).sigmoid()
        return SolOutput(
            temperature=torch.lerp(learned, geometric_temperature(times, self.heads), share),
            importance=torch.lerp(
                _choose(spatial, predicted_spatial, present), geometric_importance(times, self.side), share
            ),
            predicted_stats=predicted_stats.float(),
            predicted_spatial=predicted_spatial,
        )


def geometric_temperature(times: Tensor, heads: int) -> Tensor:
    """Return 1 + t, spread a little over the heads, `b nh` for times `b`: late attention is softer."""
    spread = torch.linspace(-_HEAD_SPREAD, _HEAD_SPREAD, heads, device=times.device)
    return (1 + times[:, None] + spread).clamp(0.5, 3.0)


def geometric_importance(times: Tensor, side: int) -> Tensor:
    """Return maps `b side side` for times `b`: early the centre of the image counts, late all of it."""
    level = rearrange(times, "b -> b 1 1")
    return level + (1 - level) * torch.exp(-2 * centre_distance(side, times.device))


def centre_distance(side: int, device: torch.device | None = None) -> Tensor:
    """Return the distance of cells from the centre of a grid across [-1, 1], `side side`, float32."""
    axis = torch.linspace(-1, 1, side, device=device)
    return torch.hypot(axis[:, None], axis[None, :])


def inverse_temperature(output: SolOutput) -> Tensor:
    """Return the factor on attention logits, `b 1 1 1`: heads share their mean temperature."""
    return output.temperature.mean(dim=1).clamp_min(_MIN_TEMPERATURE).reciprocal()[:, None, None, None]


def importance_grid(output: SolOutput, rows: int, columns: int) -> Tensor:
    """Return the map at the resolution of an image's tokens, `b 1 rows columns`."""
    return functional.interpolate(output.importance[:, None], (rows, columns), mode="bilinear")


def _choose(teacher: Tensor | None, predicted: Tensor, present: Tensor | None) -> Tensor:
    """Return the teacher's values where there are some, in the dtype of the prediction."""
    if teacher is None:
        return predicted
    teacher = teacher.to(predicted.dtype)
    if present is None:
        return teacher
    return torch.where(present.reshape(-1, *[1] * (predicted.ndim - 1)), teacher, predicted)
