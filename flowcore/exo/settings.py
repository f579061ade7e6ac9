"""What decides a picture of Exo besides prompt, seed and weights."""

from dataclasses import asdict, dataclass
from functools import partial
from typing import ClassVar

from torch import Tensor

from ..errors import ConfigError
from ..flow.schedule import sigma_grid
from ..flow.solvers import ddim
from ..flow.steps import Solver, check_unit
from ..models.exo.config import MAX_ITERATIONS
from ..settings import Settings

SCHEDULES = ("shift", "flux2")
_STOCHASTIC = ("euler", "ddim")


@dataclass(frozen=True, slots=True, kw_only=True)
class ExoSettings(Settings):
    """What decides a picture of Exo besides prompt, seed and weights.

    iterations: refinements in each step. preserve: share in [0, 1] by which cells that no mask marks stay as
    in the initial image. eta: share in [0, 1] of new noise in each step, of the solvers euler and ddim, which
    are one at 0. schedule: "shift", or "flux2", whose shift follows from size and steps. strength: the run
    starts at the first level of the grid that is not above it; below 1 it has fewer steps than num_steps.
    rewrite: whether a model that can do so first says in words what the initial image shows after what is
    asked of it, and draws that, instead of the prompt as it is.
    """

    init_strength: ClassVar[float] = 1.0

    cfg_scale: float = 4.0
    iterations: int = 4
    preserve: float = 0.0
    eta: float = 0.0
    schedule: str = "shift"
    rewrite: bool = True

    def __post_init__(self) -> None:
        """Check what does not depend on the model. Raises: ConfigError."""
        Settings.__post_init__(self)
        if not 1 <= self.iterations <= MAX_ITERATIONS:
            raise ConfigError(f"iterations must lie in 1..{MAX_ITERATIONS}, got {self.iterations}")
        check_unit("preserve", self.preserve)
        check_unit("eta", self.eta)
        if self.eta and self.solver not in _STOCHASTIC:
            raise ConfigError(
                f"eta must be 0 with solvers other than {', '.join(_STOCHASTIC)}, got {self.eta} with "
                f"{self.solver}"
            )
        if self.schedule not in SCHEDULES:
            raise ConfigError(f"schedule must be one of {', '.join(SCHEDULES)}, got {self.schedule!r}")

    @classmethod
    def of(cls, settings: Settings) -> "ExoSettings":
        """Return the settings of any model as Exo's, with the defaults of what is Exo's alone."""
        return settings if isinstance(settings, ExoSettings) else cls(**asdict(settings))

    def grid(self) -> Tensor:
        """Return the noise levels of the run, float64, the first not above the strength.

        Raises: ConfigError if that leaves none.
        """
        sigma_grid(self.num_steps, strength=self.strength)
        whole = sigma_grid(self.num_steps, self.grid_shift)
        kept = whole[whole <= self.strength + 1e-9]
        if len(kept) < 2:
            raise ConfigError(
                f"strength must be at least {float(whole[-2]):.4f}, the lowest level of {self.num_steps} "
                f"steps, got {self.strength}; take more steps"
            )
        return kept

    def solve(self) -> Solver:
        """Return the solver."""
        return partial(ddim, eta=self.eta) if self.eta else Settings.solve(self)
