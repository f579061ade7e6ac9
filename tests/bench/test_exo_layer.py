"""Layers of Exo in the benchmark: the same suffix with and without its past, and what is said of the rows."""

from dataclasses import replace

import pytest
import torch

from tests.bench import __main__ as command
from tests.bench.cases import (
    ALL_TOKENS,
    EXO_LAYER,
    EXO_TRAINED,
    HEAD_BLOCK,
    LAYERS,
    READ,
    SUFFIX,
    TRAIN,
    Case,
)
from tests.bench.exo_layer import Layer, layer_work, notes, weight_bytes
from tests.bench.measure import count_gflop
from tests.bench.running import Measured, Row
from tests.bench.subjects import inputs_of, own_subject
from tests.bench.worker import forward, training
from tests.support import FORWARD_LIMIT, assert_close

TINY = Case(arch="exo", preset="tiny", shape=(4, 6), text=8, batch=2)


def row_of(what: str, *, seconds: float, gflops: float | None = 40.0) -> Row:
    return Row(
        arch="exo", what=what, size=EXO_LAYER.size, dtype="bfloat16", batch=1, seconds=seconds,
        gflops=gflops, share=gflops and 0.5, peak_mib=1.0,
    )  # fmt: skip


def test_a_suffix_with_its_past_is_that_among_all_tokens() -> None:
    layer = Layer(TINY, "cpu")
    with torch.inference_mode():
        expected = layer.all_tokens()
        again = layer.with_past()
        assert expected.shape == (2, 8, 64)
        for _ in range(2):
            assert_close(again(), expected, limit=FORWARD_LIMIT)


def test_weights_of_the_8b_layer() -> None:
    assert weight_bytes(replace(EXO_LAYER, what=SUFFIX)) == 2 * 192_946_432
    assert weight_bytes(replace(EXO_LAYER, what=HEAD_BLOCK)) == 2 * 58_997_248
    assert layer_work(replace(TINY, what=READ), "cpu")() == weight_bytes(replace(TINY, what=SUFFIX)) / 4


@pytest.mark.parametrize("what", LAYERS)
def test_every_row_is_the_work_it_says(what: str) -> None:
    gflop = count_gflop(layer_work(replace(TINY, what=what), "cpu"))
    weights = weight_bytes(replace(TINY, what=what)) / 4
    tokens = {READ: 0, SUFFIX: 2 * 8, ALL_TOKENS: 2 * 16, HEAD_BLOCK: 2 * 24}[what]
    assert gflop == pytest.approx(2 * tokens * weights / 1e9, rel=0.3)


def test_exo_takes_a_training_step() -> None:
    case = replace(EXO_TRAINED, preset="tiny", shape=(4, 4), batch=2, what=TRAIN)
    subject, inputs = own_subject(case, "cpu"), inputs_of(case, "cpu")
    once = count_gflop(forward(subject, subject.build().eval(), inputs))
    assert (
        2 * once
        < count_gflop(training(subject, subject.build().train(), inputs, has_optimizer=True))
        < 3.2 * once
    )


def test_what_is_said_of_the_rows() -> None:
    rows = [
        row_of(READ, seconds=0.0385892864, gflops=None),
        row_of(SUFFIX, seconds=0.05),
        row_of(ALL_TOKENS, seconds=1.0),
        row_of(HEAD_BLOCK, seconds=2.0),
    ]
    cases = [replace(EXO_LAYER, what=row.what) for row in rows]
    assert notes(cases, rows) == [
        "exo 8b 32x32 + 320, a layer at a time: weights are read at 10 GB/s",
        "  suffix, one layer: 2 GFLOP and 386 MB of weights, at least 0.0386 s; measured 0.05 s, 1.30 times",
        "  all tokens, one layer: 40 GFLOP and 386 MB of weights, at least 0.5 s; measured 1 s, 2.00 times",
        "  head block: 80 GFLOP and 118 MB of weights, at least 1 s; measured 2 s, 2.00 times",
        "  the past kept: 20 times as fast as all tokens again",
    ]
    assert notes(cases[1:], rows[1:]) == []


def test_the_command_says_it(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def measure(case: Case, **_: object) -> Measured:
        row = row_of(case.what, seconds=0.1, gflops=None if case.what == READ else 40.0)
        return Measured(row=row, peak_gflops=80.0, relative=1.0)

    monkeypatch.setattr(command, "measure", measure)
    assert command.main(["--arch", "exo", "--what", READ, SUFFIX]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("  suffix, one layer: 4 GFLOP")
