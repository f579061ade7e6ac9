"""What decides a picture besides prompt, seed and weights."""

import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from .errors import ConfigError
from .flow.guidance import Combine, cfg_rescale, cfg_zero_star
from .flow.schedule import sigma_grid, zero_init
from .flow.solvers import SOLVERS
from .flow.steps import Solver

MAX_SEED = 2**64 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What decides a picture besides prompt, seed and weights.

    width, height: pixels; None = the model's own. cfg_scale: 1 = no guidance. cfg_rescale: share in [0, 1] by
    which guidance keeps the spread of the conditional prediction. cfg_zero: CFG-Zero* guidance, whose first
    step leaves the noise as it is. cfg_interval: noise levels between which guidance acts. shift: above 1
    spends more steps at high noise; None = the model's own. strength: share of the way to noise at which an
    initial image starts; init_strength: what it is with an initial image, unless somebody says otherwise.
    """

    init_strength: ClassVar[float] = 0.6

    negative_prompt: str = ""
    width: int | None = None
    height: int | None = None
    num_steps: int = 20
    cfg_scale: float = 2.0
    cfg_rescale: float = 0.0
    cfg_zero: bool = False
    cfg_interval: tuple[float, float] = (0.0, 1.0)
    solver: str = "euler"
    shift: float | None = None
    strength: float = 1.0

    def __post_init__(self) -> None:
        """Check what does not depend on the model. Raises: ConfigError."""
        if self.solver not in SOLVERS:
            near = difflib.get_close_matches(self.solver, SOLVERS, n=1)
            hint = f"; nearest is {near[0]}" if near else ""
            raise ConfigError(f"solver must be one of {', '.join(SOLVERS)}, got {self.solver!r}{hint}")
        if not math.isfinite(self.cfg_scale):
            raise ConfigError(f"cfg_scale must be finite, got {self.cfg_scale}; 1 switches guidance off")
        if self.cfg_zero and self.cfg_rescale:
            raise ConfigError(f"cfg_rescale must be 0 together with cfg_zero, got {self.cfg_rescale}")
        self.sigmas()
        self.guidance_rule()

    def sigmas(self) -> Tensor:
        """Return the noise levels of the run: the grid, without its first with cfg_zero."""
        grid = self.grid()
        return zero_init(grid) if self.cfg_zero and self.cfg_scale != 1 else grid

    def grid(self) -> Tensor:
        """Return `num_steps + 1` noise levels from the strength down to 0, float64."""
        return sigma_grid(self.num_steps, self.grid_shift, strength=self.strength)

    @property
    def grid_shift(self) -> float:
        """The shift of the grid; 1 where none is known yet."""
        return 1.0 if self.shift is None else self.shift

    def solve(self) -> Solver:
        """Return the solver."""
        return SOLVERS[self.solver]

    def guidance_rule(self) -> Combine | None:
        """Return how both predictions are mixed; None = plain."""
        if self.cfg_zero:
            return cfg_zero_star
        return cfg_rescale(self.cfg_rescale) if self.cfg_rescale else None


def whole_size(settings: Settings) -> tuple[int, int]:
    """Return width and height of settings that have them."""
    assert settings.width is not None
    assert settings.height is not None
    return settings.width, settings.height


def check_request(
    prompts: Sequence[str], seeds: Sequence[int], settings: Settings, *, has_clean: bool, has_mask: bool
) -> None:
    """Check what a request says once. Raises: ConfigError."""
    if isinstance(prompts, str) or not prompts or len(prompts) != len(seeds):
        raise ConfigError(
            f"prompts must be a list with one seed each, got {len(prompts)} and {len(seeds)} seeds"
        )
    wrong = next((seed for seed in seeds if not 0 <= seed <= MAX_SEED), None)
    if wrong is not None:
        raise ConfigError(f"seed must lie in 0..{MAX_SEED}, got {wrong}")
    if has_mask and not has_clean:
        raise ConfigError("a mask must come with an initial image, got none; pass init_image (--init)")
    if settings.strength < 1 and not has_clean:
        raise ConfigError(
            f"strength must be 1 without an initial image, got {settings.strength}; pass init_image (--init)"
        )
