"""Read off what is finished: how well embeddings separate groups, and the power law of a loss curve."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from flowcore.errors import ShapeError

UNGROUPED = -1
SMALLEST_CROSS = 0.01
"""Below this cross-group similarity the ratio of the two similarities means nothing."""

CLASS_GROUPS: Mapping[str, tuple[range, ...]] = {
    "dogs": (range(151, 269),),
    "cats": (range(281, 286),),
    "birds": (range(7, 24), range(80, 100)),
    "fish": (range(8), range(389, 398)),
    "vehicles": (range(404, 450),),
    "food": (range(924, 970),),
    "primates": (range(365, 385),),
    "reptiles": (range(25, 69),),
}
"""ImageNet class numbers by group, as in the embedding report of Ouroboros. Class 7 is in two; fish, the
later, has it. Several ranges hold more than their name says."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Similarities:
    """Means of cosine similarities over pairs i < j. None where there is no such pair.

    separation_ratio: same / cross; None also where |cross| is below 0.01. cohesion: by group, within it.
    """

    mean_all: float | None
    same_group: float | None
    cross_group: float | None
    separation_ratio: float | None
    cohesion: dict[int, float | None]


def similarities(embeddings: Tensor, groups: Tensor) -> Similarities:
    """Return how alike embeddings are within and across groups.

    Shapes: embeddings `b d`; groups `b` integers, -1 = in no group: such items count for mean_all only.
    Raises: ShapeError if the two do not fit.
    """
    if embeddings.ndim != 2 or groups.shape != embeddings.shape[:1]:
        raise ShapeError(
            f"groups must be one number for each embedding, got {tuple(groups.shape)} for "
            f"{tuple(embeddings.shape)}"
        )
    unit = functional.normalize(embeddings.double(), dim=1)
    cosine = unit @ unit.T
    pairs = torch.ones_like(cosine, dtype=torch.bool).triu(1)
    grouped = (groups != UNGROUPED)[:, None] & (groups != UNGROUPED)[None]
    equal = groups[:, None] == groups[None]
    same = _mean(cosine[pairs & grouped & equal])
    cross = _mean(cosine[pairs & grouped & ~equal])
    is_defined = same is not None and cross is not None and abs(cross) >= SMALLEST_CROSS
    return Similarities(
        mean_all=_mean(cosine[pairs]),
        same_group=same,
        cross_group=cross,
        separation_ratio=same / cross if is_defined and same is not None and cross is not None else None,
        cohesion={
            int(group): _mean(cosine[pairs & equal & (groups == group)[:, None]])
            for group in sorted(set(groups.tolist()))
            if group != UNGROUPED
        },
    )


def class_groups(count: int) -> Tensor:
    """Return the group number of each of `count` ImageNet classes, -1 where it has none."""
    groups = torch.full((count,), UNGROUPED)
    for number, ranges in enumerate(CLASS_GROUPS.values()):
        for span in ranges:
            groups[span.start : span.stop] = number
    return groups


def variance_shares(embeddings: Tensor) -> Tensor:
    """Return the share of variance of each principal component of embeddings `b d`, descending, float64."""
    centred = embeddings.double() - embeddings.double().mean(dim=0)
    variances = torch.linalg.svdvals(centred).square()
    shares: Tensor = variances / variances.sum()
    return shares


def components_for(shares: Tensor, share: float) -> int:
    """Return how many leading components hold at least this share of the variance."""
    return int((shares.cumsum(0) < share - 1e-12).sum()) + 1


def nearest(embeddings: Tensor, count: int) -> Tensor:
    """Return the numbers `b count` of the most similar other embeddings of each, most similar first."""
    unit = functional.normalize(embeddings.double(), dim=1)
    cosine = (unit @ unit.T).fill_diagonal_(-torch.inf)
    return cosine.topk(count, dim=1).indices


def _mean(values: Tensor) -> float | None:
    return values.mean().item() if values.numel() else None


@dataclass(frozen=True, slots=True, kw_only=True)
class PowerLaw:
    """loss(step) = a * step^(-b) + c; the share of variance explained, the number of points fitted to."""

    a: float
    b: float
    c: float
    r2: float
    points: int

    def loss(self, step: float) -> float:
        """Return the loss expected at a step."""
        return float(self.a * step**-self.b + self.c)

    def steps_to(self, loss: float) -> float:
        """Return the step at which the loss is reached, infinite if it never is."""
        if loss <= self.c or self.b <= 0:
            return math.inf
        return float(((loss - self.c) / self.a) ** (-1 / self.b))


A_BOUNDS = (0.1, 100.0)
B_BOUNDS = (0.0, 2.0)
C_BOUNDS = (0.0, 5.0)


def fit_power_law(
    steps: Sequence[float], losses: Sequence[float], *, max_loss: float = 1.0, min_step: float = 200
) -> PowerLaw:
    """Return the least-squares power law of the points with loss < max_loss and step >= min_step.

    For a given b the best a and c have a closed form, so only b is searched for.
    Raises: ShapeError if fewer than four points are left.
    """
    step, loss = np.asarray(steps, dtype=np.float64), np.asarray(losses, dtype=np.float64)
    kept = (loss < max_loss) & (step >= min_step)
    step, loss = step[kept], loss[kept]
    if len(step) < 4:
        raise ShapeError(
            f"a power law must have at least 4 points with loss below {max_loss} from step {min_step} on, "
            f"got {len(step)}"
        )
    b = _minimum(lambda exponent: _best_line(step**-exponent, loss)[2], *B_BOUNDS)
    a, c, error = _best_line(step**-b, loss)
    r2 = 1 - error / float(np.square(loss - loss.mean()).sum())
    return PowerLaw(a=a, b=b, c=c, r2=r2, points=len(step))


def _best_line(x: NDArray[np.float64], y: NDArray[np.float64]) -> tuple[float, float, float]:
    """Return a, c within their bounds and the squared error of y = a x + c."""
    x_mean, y_mean = x.mean(), y.mean()
    spread = float(np.square(x - x_mean).sum())
    a = float(((x - x_mean) * (y - y_mean)).sum()) / spread if spread else A_BOUNDS[0]
    a = min(max(a, A_BOUNDS[0]), A_BOUNDS[1])
    c = min(max(float(y_mean - a * x_mean), C_BOUNDS[0]), C_BOUNDS[1])
    return a, c, float(np.square(y - a * x - c).sum())


def _minimum(function: Callable[[float], float], low: float, high: float) -> float:
    """Return where a function is least: the best of a coarse grid, refined by golden sections."""
    grid = np.linspace(low, high, 201)
    best = int(np.argmin([function(float(point)) for point in grid]))
    low, high = float(grid[max(best - 1, 0)]), float(grid[min(best + 1, len(grid) - 1)])
    ratio = (math.sqrt(5) - 1) / 2
    while high - low > 1e-9:
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        if function(left) < function(right):
            high = right
        else:
            low = left
    return (low + high) / 2
