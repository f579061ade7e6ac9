"""What keeping the past gains a whole Exo: a step with it and one with all tokens through the trunk again."""

from collections.abc import Callable, Sequence

import torch

from flowcore.models.exo import Exo
from tests.bench.cases import KEPT, PROMPT, STEP, STEP_AGAIN, Case
from tests.bench.running import Row
from tests.exo_recomputed import Prompt, random_exo, recomputed_step, sized_trunk

TRUNKS = {"trunk-512x12": (512, 12, 1360), "trunk-256x8": (256, 8, 680)}
"""Width, layers and width of the feed-forward; heads and memory are those of the preset tiny."""
QUERIES, ITERATIONS, RUN = 14, 4, 20


def speed_work(case: Case) -> Callable[[], object]:
    """The call of a row, on the CPU in float32."""
    return torch.inference_mode()(calls_of(case)[case.what])


def calls_of(case: Case) -> dict[str, Callable[[], object]]:
    """The calls of a model's rows."""
    model = model_of(case)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(256, (case.batch, case.text), generator=generator)
    z = torch.randn(case.batch, model.config.latent_channels, *case.shape, generator=generator)
    t, size = torch.full((case.batch,), 0.5), (case.shape[0], case.shape[1])
    with torch.inference_mode():
        prefix = model.encode(ids, size=size)
    return {
        PROMPT: lambda: model.encode(ids, size=size),
        STEP: lambda: model.step(z, t, prefix, iterations=ITERATIONS),
        STEP_AGAIN: lambda: recomputed_step(model, z, t, Prompt(token_ids=ids), iterations=ITERATIONS),
    }


def model_of(case: Case) -> Exo:
    """A model with random weights and open gates."""
    return random_exo(trunk=sized_trunk(*TRUNKS[case.preset]), num_queries=QUERIES)


def notes(cases: Sequence[Case], rows: Sequence[Row]) -> list[str]:
    """A line for each model whose three rows were measured."""
    found: dict[str, dict[str, float]] = {}
    for case, row in zip(cases, rows, strict=True):
        if case.what in KEPT:
            found.setdefault(row.size, {})[case.what] = row.seconds
    return [
        f"exo {size}: {RUN} steps of {ITERATIONS} iterations with the past kept are "
        f"{RUN * seconds[STEP_AGAIN] / (seconds[PROMPT] + RUN * seconds[STEP]):.2f} times as fast"
        for size, seconds in found.items()
        if len(seconds) == len(KEPT)
    ]
