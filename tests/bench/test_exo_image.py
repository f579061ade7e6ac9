"""Pictures of Exo in the benchmark: the arithmetic of the rooflines, and a run with small sizes."""

from dataclasses import replace

import pytest
import torch

from flowcore.models.exo import Exo
from tests.bench import exo_image
from tests.bench.cases import FORWARD, IMAGE, IMAGE_GUIDED, IMAGES, Case
from tests.bench.exo_image import CARDS, Work, image_gflop, image_work, notes, roofline, work_of_row
from tests.bench.measure import count_gflop
from tests.bench.running import Row, measure

TINY = Case(arch="exo", preset="tiny", shape=(4, 6), text=8)


@pytest.mark.parametrize(
    ("work", "card", "best", "likely"),
    [
        (Work(flop=243e12, suffix_flop=18e12, suffix_bytes=1.14e12), "A100 80 GB", 1.3, 2.2),
        (Work(flop=243e12, suffix_flop=18e12, suffix_bytes=1.14e12), "H100 SXM", 0.6, 0.9),
        (Work(flop=475e12, suffix_flop=36e12, suffix_bytes=1.14e12), "A100 80 GB", 2.0, 3.6),
        (Work(flop=475e12, suffix_flop=36e12, suffix_bytes=1.14e12), "RTX 5090", 2.7, 5.1),
        (Work(flop=518e12, suffix_flop=38e12, suffix_bytes=1.16e12), "H200", 0.7, 1.3),
    ],
)
def test_rooflines_of_the_8b_preset(work: Work, card: str, best: float, likely: float) -> None:
    assert roofline(work, CARDS[card]) == pytest.approx(best, abs=0.07)
    assert roofline(work, CARDS[card], of_flops=0.5, of_bandwidth=0.75) == pytest.approx(likely, abs=0.07)


def test_suffixes_of_the_8b_preset() -> None:
    """80 passes of 16 tokens through 6.95 billion weights of two bytes each: 18 TFLOP, 1.1 TB."""
    work = work_of_row(replace(IMAGES["gpu"], what=IMAGE, dtype="bfloat16"), 243e3)
    assert work.flop == 243e12
    assert work.suffix_flop == pytest.approx(18e12, rel=0.02)
    assert work.suffix_bytes == pytest.approx(1.11e12, rel=0.01)
    guided = work_of_row(replace(IMAGES["gpu"], what=IMAGE_GUIDED, dtype="bfloat16"), 475e3)
    assert guided.suffix_flop == 2 * work.suffix_flop
    assert guided.suffix_bytes == work.suffix_bytes
    full = work_of_row(replace(IMAGES["gpu"], what=IMAGE, dtype="float32"), 243e3)
    assert full.suffix_flop == pytest.approx(work.suffix_flop, rel=1e-3)
    assert full.suffix_bytes == pytest.approx(2 * work.suffix_bytes, rel=1e-3)


@pytest.mark.parametrize(("what", "rows"), [(IMAGE, 1), (IMAGE_GUIDED, 2)])
def test_a_small_picture(monkeypatch: pytest.MonkeyPatch, what: str, rows: int) -> None:
    sizes: list[tuple[int, int]] = []
    step = Exo.step

    def counted(self: Exo, z: torch.Tensor, *arguments: object, **options: int) -> object:
        sizes.append((len(z), options["iterations"]))
        return step(self, z, *arguments, **options)

    monkeypatch.setattr(Exo, "step", counted)
    monkeypatch.setattr(exo_image, "STEPS", 5)
    work = image_work(replace(TINY, what=what), "cpu")
    images: list[object] = []
    counted_in_full = count_gflop(lambda: images.append(work(5)))
    assert images[0].shape == (1, 3, 32, 48)
    assert sizes == [(rows, 4)] * 5
    assert image_gflop(work) == pytest.approx(counted_in_full, rel=1e-9)
    assert len(sizes) == 5 + 1 + 2


def test_what_is_said_of_a_row() -> None:
    row = Row(
        arch="exo",
        what=IMAGE,
        size="8b 64x64 + 320",
        dtype="bfloat16",
        batch=1,
        seconds=2.5,
        gflops=243e3 / 2.5,
        share=0.5,
        peak_mib=21_000.0,
    )
    case = replace(IMAGES["gpu"], what=IMAGE, dtype="bfloat16")
    lines = notes([case, case, case], [row, replace(row, what=FORWARD), replace(row, gflops=None)])
    assert lines[0] == (
        "exo 8b 64x64 + 320, image 20 steps: measured 2.5 s and 22.02 GB; "
        "described at 8B: 3 s on an A100, 32 GB"
    )
    assert lines[1].startswith("  243 TFLOP, 1.11 TB of weights for suffixes; roofline in seconds")
    assert [line.split()[-2:] for line in lines[2:4]] == [["1.27", "2.17"], ["0.559", "0.898"]]
    assert len(lines) == 2 + len(CARDS)


@pytest.mark.gpu
@pytest.mark.slow
def test_the_8b_preset_makes_a_picture_in_32_gb() -> None:
    case = replace(IMAGES["gpu"], what=IMAGE_GUIDED, dtype="bfloat16")
    result = measure(case, device="cuda", repeats=1)
    assert result.row.peak_mib * 2**20 < 32e9
