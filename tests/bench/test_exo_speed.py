"""The rows on what the past gains: equal results, the sizes of the trunks, and what is said of them."""

from dataclasses import replace

import pytest
import torch

from flowcore.models.exo import StepResult
from tests.bench import exo_speed
from tests.bench.cases import EXO_TRUNKS, FORWARD, KEPT, PROMPT, STEP, STEP_AGAIN
from tests.bench.exo_speed import calls_of, notes
from tests.bench.measure import count_gflop
from tests.bench.running import Row
from tests.support import CHAIN_LIMIT, assert_close


def test_a_step_is_the_same_both_ways_for_a_tenth_of_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(exo_speed.TRUNKS, "trunk-256x8", (128, 4, 256))
    calls = calls_of(replace(EXO_TRUNKS[1], text=64))
    results: list[StepResult] = []
    with torch.inference_mode():
        flop = [
            count_gflop(lambda call=calls[what]: results.append(call()))  # type: ignore[misc]
            for what in (STEP, STEP_AGAIN)
        ]
    assert_close(results[0].velocity, results[1].velocity, limit=CHAIN_LIMIT)
    assert flop[1] > 4 * flop[0]


def test_what_is_said_of_the_rows() -> None:
    seconds = {PROMPT: 1.0, STEP: 0.1, STEP_AGAIN: 0.9}
    cases = [replace(EXO_TRUNKS[0], what=what) for what in (*KEPT, FORWARD)]
    rows = [
        Row(
            arch="exo", what=case.what, size=case.size, dtype="float32", batch=1,
            seconds=seconds.get(case.what, 7.0), gflops=1.0, share=0.5, peak_mib=1.0,
        )
        for case in cases
    ]  # fmt: skip
    assert notes(cases, rows) == [
        "exo trunk-512x12 4x4 + 256: 20 steps of 4 iterations with the past kept are 6.00 times as fast"
    ]
    assert notes(cases[1:], rows[1:]) == []
