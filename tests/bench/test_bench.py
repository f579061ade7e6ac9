"""The benchmark's command, its rows, and a run with a stand-in for an original."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional
from torch.utils.flop_counter import sdpa_flop_count

from tests.bench import __main__ as command
from tests.bench.cases import (
    BACKWARD,
    CHECKPOINTED,
    IMAGE,
    IMAGE_GUIDED,
    KEPT,
    LAYERS,
    LOAD,
    SAMPLE,
    SMOKE,
    TRAIN,
    Case,
    Job,
    suite,
)
from tests.bench.measure import count_gflop, for_heads
from tests.bench.references import REFERENCES
from tests.bench.running import BenchError, Measured, Row, measure
from tests.bench.subjects import inputs_of, own_subject

FIELDS = "arch what size dtype batch seconds gflops share peak_mib reference_seconds ratio stored ok"
SMALL = Case(arch="single_stream", preset="tiny", shape=(8, 8), text=4, batch=2)
ORIGINAL = """
import torch

print("a line that is no answer")

class SingleStreamDiTV2(torch.nn.Module):
    def __init__(self, gradient_checkpointing, hidden_size, in_channels, **others):
        super().__init__()
        self.layer = torch.nn.Conv2d(in_channels, in_channels, 1)

    def forward(self, x, t, text):
        return self.layer(x)
"""


def measured(case: Case, relative: float) -> Measured:
    row = Row(
        arch=case.arch,
        what=case.what,
        size=case.size,
        dtype=case.dtype,
        batch=case.batch,
        seconds=0.5,
        gflops=40.0,
        share=0.5,
        peak_mib=100.0,
    )
    return Measured(row=row, peak_gflops=80.0, relative=relative)


@pytest.fixture
def relative(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, list[float]]:
    """What measurements will say, in turn, by architecture; 10 is stored for each."""
    values: dict[str, list[float]] = {case.arch: [10.0] for case in SMOKE}
    stored = tmp_path / "stored.json"
    stored.write_text(json.dumps(dict.fromkeys(values, 10.0)))
    monkeypatch.setattr(command, "STORED", stored)
    monkeypatch.setattr(command, "measure", lambda case, **_: measured(case, values[case.arch].pop(0)))
    return values


def test_smoke_rows_and_their_file(relative: dict[str, list[float]], tmp_path: Path) -> None:
    relative["flux"] = [11.4]
    assert command.main(["--suite", "smoke", "--json", str(tmp_path / "rows.json")]) == 0
    document = json.loads((tmp_path / "rows.json").read_text())
    assert set(document) == {"peak_gflops", "rows"}
    assert document["peak_gflops"] == 80
    assert [row["arch"] for row in document["rows"]] == [case.arch for case in SMOKE]
    for row in document["rows"]:
        assert list(row) == FIELDS.split()
        assert (row["stored"], row["ok"]) == (10, True)


@pytest.mark.parametrize(("values", "code"), [([11.6, 11.6], 1), ([11.6, 10.0], 0), ([11.6, 11.7], 1)])
def test_a_slow_forward_is_measured_again_and_fails(
    relative: dict[str, list[float]],
    capsys: pytest.CaptureFixture[str],
    values: list[float],
    code: int,
) -> None:
    relative["xut"] = list(values)
    assert command.main(["--suite", "smoke", "--arch", "xut"]) == code
    printed = capsys.readouterr()
    assert ("slower" in printed.out) == bool(code)
    message = "error: xut must take at most 11.5 matrix products (stored 10.0), got 11.6"
    assert (message in printed.err.splitlines()) == bool(code)


def test_rows_are_chosen_by_kind() -> None:
    chosen = command.find_cases("cpu", ["xut"], ["load", "forward"])
    assert [case.what for case in chosen] == ["load", "forward", "forward"]


def test_values_are_stored(relative: dict[str, list[float]]) -> None:
    relative["flux"] = [20.06]
    assert command.main(["--suite", "smoke", "--store", "--arch", "flux"]) == 0
    assert command.stored_values() == {**{case.arch: 10.0 for case in SMOKE}, "flux": 20.1}


def test_every_architecture_has_a_stored_value() -> None:
    stored = json.loads(command.STORED.read_text())
    assert set(stored) == {case.arch for case in SMOKE}
    assert all(value > 0 for value in stored.values())


def test_a_row_that_fails_is_named_and_the_others_go_on(
    relative: dict[str, list[float]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(case: Case, **_: object) -> Measured:
        if case.arch == "xut":
            raise BenchError("xut forward failed: no memory")
        return measured(case, relative[case.arch].pop())

    monkeypatch.setattr(command, "measure", fail)
    assert command.main(["--suite", "smoke"]) == 1
    printed = capsys.readouterr()
    assert "error: xut forward failed: no memory" in printed.err.splitlines()
    assert printed.out.count(" ok") == len(SMOKE) - 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--arch", "xut", "unet"], "--arch must be among exo, flux, single_stream, tinyflux, xut, got unet"),
        (["--reference", "unet=."], f"--reference must name one of {', '.join(REFERENCES)}, got 'unet=.'"),
        (["--reference", "xut"], "--reference xut must give a folder, got ''; use xut=DIR"),
        (["--reference", "xut=nowhere"], "--reference xut must give a folder, got 'nowhere'; use xut=DIR"),
    ],
)
def test_unusable_arguments_are_one_line(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert command.main(arguments) == 2
    assert capsys.readouterr().err == f"error: {message}\n"


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA device")
def test_the_gpu_suite_needs_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--suite", "gpu"]) == 2
    assert capsys.readouterr().err.startswith("error: --suite gpu must run on a machine with a CUDA device")


def test_a_row_for_every_original_that_can_do_it() -> None:
    originals = [("bfl", "a"), ("comfyui", "b"), ("xut", "c")]
    flux, trained = (replace(SMOKE[1], what=what) for what in ("forward", TRAIN))
    assert list(command.pairs([flux, trained, SMALL], originals)) == [
        (flux, ("bfl", "a")),
        (flux, ("comfyui", "b")),
        (trained, ("bfl", "a")),
        (SMALL, None),
    ]


@pytest.mark.parametrize("name", ["cpu", "smoke"])
def test_every_size_can_be_built_and_called(name: str) -> None:
    cases = [case for case in suite(name) if case.what not in (*LAYERS, *KEPT)]
    sizes = {(case.arch, case.size, case.batch): replace(case, what="forward") for case in cases}
    for case in sizes.values():
        device = "cpu" if case.arch == "exo" else "meta"  # exo looks at the token ids
        subject, inputs = own_subject(case, device), inputs_of(case, device)
        result = subject.call(subject.build().eval(), inputs.latents, inputs.sigma, inputs.conditioning)
        assert result.shape == inputs.latents.shape
        assert inputs.doubled().batch == 2 * case.batch


def test_the_gpu_suite_has_the_same_rows_in_bfloat16() -> None:
    smaller = (SAMPLE, IMAGE, IMAGE_GUIDED, *KEPT)  # on a CPU, or there alone
    rows = {(case.arch, case.what, case.size) for case in suite("gpu") if case.what not in smaller}
    assert rows == {(case.arch, case.what, case.size) for case in suite("cpu") if case.what not in smaller}
    assert {case.dtype for case in suite("gpu")} == {"bfloat16"}


def test_jobs_survive_the_way_to_a_worker() -> None:
    job = Job(SMOKE[1], "cpu", ("bfl", "folder"))
    arrived = Job.from_json(job.to_json())
    assert (arrived.case, arrived.device, tuple(arrived.reference)) == (job.case, "cpu", ("bfl", "folder"))


def test_operations_are_counted() -> None:
    a, b = torch.randn(3, 5), torch.randn(5, 7)
    assert count_gflop(lambda: a @ b) == pytest.approx(2 * 3 * 5 * 7 / 1e9)
    q, k = torch.randn(2, 3, 16, 8, requires_grad=True), torch.randn(2, 3, 24, 8, requires_grad=True)
    forward = 2 * 2 * 2 * 3 * 16 * 24 * 8 / 1e9  # q k^T and the weighted sum

    def backward() -> None:
        functional.scaled_dot_product_attention(q, k, k).sum().backward()

    with torch.no_grad():
        assert count_gflop(lambda: functional.scaled_dot_product_attention(q, k, k)) == pytest.approx(forward)
    assert count_gflop(backward) == pytest.approx(3.5 * forward)  # the weights are computed again


def test_operations_of_attention_with_shared_keys_are_counted() -> None:
    q, k = torch.randn(2, 6, 16, 8), torch.randn(2, 3, 16, 8)
    forward = 2 * 2 * 2 * 6 * 16 * 16 * 8 / 1e9
    assert count_gflop(
        lambda: functional.scaled_dot_product_attention(q, k, k, is_causal=True, enable_gqa=True)
    ) == pytest.approx(forward)
    shapes = torch.Size((2, 6, 16, 8)), torch.Size((2, 3, 16, 8))
    assert sdpa_flop_count(shapes[0], for_heads(*shapes), for_heads(*shapes)) == forward * 1e9


@pytest.mark.slow
@pytest.mark.parametrize("what", ["forward", LOAD, BACKWARD, TRAIN, CHECKPOINTED, SAMPLE])
def test_a_row_beside_an_original(tmp_path: Path, what: str) -> None:
    (tmp_path / "model.py").write_text(ORIGINAL)
    case = replace(SMALL, what=what)
    result = measure(case, device="cpu", repeats=2, reference=("single_stream", str(tmp_path)))
    row = result.row
    assert row.size == "tiny 8x8 + 4"
    assert row.seconds > 0
    assert row.reference_seconds is not None
    assert 0 < row.reference_seconds < row.seconds or what == LOAD
    assert row.ratio is not None
    assert row.ratio > 0
    assert 50 < row.peak_mib < 4000
    assert result.reference_peak_mib is not None
    assert 50 < result.reference_peak_mib < 4000
    assert result.relative > 0
    if what == LOAD:
        assert row.gflops is None
    else:
        assert row.gflops is not None
        assert row.share == pytest.approx(row.gflops / result.peak_gflops)


@pytest.mark.slow
def test_an_original_that_does_not_start_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text("raise RuntimeError('no such layer')\n")
    with pytest.raises(BenchError, match=r"^single_stream: .* failed: RuntimeError: no such layer"):
        measure(SMALL, device="cpu", repeats=1, reference=("single_stream", str(tmp_path)))
