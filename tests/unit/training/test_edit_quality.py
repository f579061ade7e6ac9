"""Edits against the true ones: the arithmetic with known masks, and the command with a tiny model."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from flowcore.exo import ExoInfo, ExoPipeline, ExoSettings, Refined
from flowcore.exo.prefixes import Recent
from flowcore.images import image_to_tensor
from flowcore.models.exo import Exo
from flowcore.models.exo.labels import changed_cells
from flowcore.vae.autoencoder import Autoencoder
from tests import tiny, tiny_exo
from tests.unit.training.workspace import error_line
from training.compare import main
from training.edit_quality import Truth, compare_edit, measure_edits, overlap, psnr_where
from training.encoders import PixelEncoder
from training.scenes import draw, iterate_edits

SIDE = 64
PIXELS = PixelEncoder(4)
EDIT = next(iterate_edits(1, 7, split="test"))[0]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exo")
    return tiny_exo.write_parts(folder, **{"modelspec.resolution": f"{SIDE}x{SIDE}"})


def info_of(mask: Tensor, prompt: str = EDIT.instruction) -> ExoInfo:
    """What a run with this mask `hm wm` would leave, of a model that drew this."""
    size = (2 * mask.shape[0], 2 * mask.shape[1])
    three = mask[None].float()
    return ExoInfo(
        mask=three,
        sparse_mask=three,
        iteration_masks=three,
        size=size,
        downscale=8,
        timings={},
        seed=0,
        prompt=prompt,
    )


def test_overlap_and_quality_where() -> None:
    first, second = np.array([True, True, False]), np.array([False, True, True])
    assert overlap(first, second) == pytest.approx(1 / 3)
    assert overlap(~first & ~first & first, first & ~first) == 1.0
    black, gray = np.zeros((2, 2, 3), np.uint8), np.full((2, 2, 3), 51, np.uint8)
    gray[0, 0] = 255
    where = np.array([[False, True], [True, True]])
    assert psnr_where(black, gray, where) == pytest.approx(20 * np.log10(5))
    assert psnr_where(black, black, where) == pytest.approx(58.92, abs=0.01)
    assert psnr_where(black, gray, ~where & where) is None


def test_what_a_model_says_of_an_edit() -> None:
    source = Image.new("RGB", (SIDE, SIDE), (20, 30, 40))
    truth = Truth.between(PIXELS, EDIT, source, source)  # type: ignore[arg-type]
    found = {
        prompt: compare_edit(truth, source, info_of(torch.zeros(4, 4), prompt))["said_right"]
        for prompt in (EDIT.answer.split("\n")[-1], EDIT.answer, "", EDIT.instruction)
    }
    assert list(found.values()) == [100.0, 0.0, 0.0, None]


def test_one_edit_with_known_masks() -> None:
    """A picture of one colour in which the square of one cell turns white."""
    source = Image.new("RGB", (SIDE, SIDE), (20, 30, 40))
    target = source.copy()
    target.paste((255, 255, 255), (16, 32, 32, 48))

    def compare(mask: Tensor) -> dict[str, float | None]:
        return compare_edit(Truth.between(PIXELS, EDIT, source, target), target, info_of(mask))  # type: ignore[arg-type]

    mask = torch.zeros(4, 4)
    mask[2, 1] = 1.0
    right = compare(mask)
    assert (right["mask_iou"], right["pixel_iou"], right["pixel_iou_of_cells"]) == (1.0, 1.0, 1.0)
    for name in ("kept_psnr", "unchanged_psnr", "vae_psnr"):
        assert right[name] == pytest.approx(58.92, abs=0.01)
    wide = mask.clone()
    wide[2, 2] = wide[2, 3] = 1.0
    assert compare(wide)["mask_iou"] == pytest.approx(1 / 3)
    nothing = compare(torch.zeros(4, 4))
    mean = ((235**2 + 225**2 + 215**2) / 3) * (16 * 16) / SIDE**2
    assert nothing["kept_psnr"] == pytest.approx(10 * np.log10(255**2 / mean))
    assert (nothing["mask_iou"], nothing["pixel_iou"]) == (0.0, 0.0)
    everything = compare(torch.ones(4, 4))
    assert everything["kept_psnr"] is None
    assert everything["pixel_iou"] == pytest.approx(1 / 16)


class Perfect:
    """Shows every target, and marks what the latents say; every second edit is left undone instead."""

    vae, default_size = PIXELS, (SIDE, SIDE)

    def __init__(self) -> None:
        self.edits = [edit for edit, _ in iterate_edits(4, 7, split="test")]
        self.prefixes, self.encoded = Recent(), Recent()

    def refine(
        self, prompts: list[str], seeds: list[int], settings: ExoSettings, init_images: list[Image.Image]
    ) -> list[Refined]:
        del settings
        made = []
        for prompt, seed, source in zip(prompts, seeds, init_images, strict=True):
            edit = self.edits[seed]
            assert prompt == edit.instruction
            assert np.array_equal(source, draw(edit.source, SIDE))
            target = draw(edit.target, SIDE)
            pixels = [image_to_tensor(picture, SIDE, SIDE) for picture in (source, target)]
            cells = changed_cells(*map(self.vae.encode, pixels))[0]
            shown, mask = (target, cells) if seed % 2 == 0 else (source, torch.zeros(4, 4))
            made.append(Refined(image=shown, info=info_of(mask)))
        return made


def test_means_over_edits(tmp_path: Path) -> None:
    settings = {"one": ExoSettings(), "other": ExoSettings()}
    made = measure_edits(
        Perfect(), 4, 7, settings, batch=3, objects="mixed", folders={"one": tmp_path, "other": None},
    )  # fmt: skip  # type: ignore[arg-type]
    found = made["one"]
    assert {**found, "seconds_per_image": 0} == {**made["other"], "seconds_per_image": 0}
    assert found["accuracy"]["all"] == 0.5
    assert found["mask_iou"] == pytest.approx(0.5)
    assert set(found["success_by_kind"].values()) <= {0.0, 0.5, 1.0}
    assert sorted(path.name for path in tmp_path.glob("000003*")) == [
        "000003.mask.png", "000003.png", "000003.source.png", "000003.txt",
    ]  # fmt: skip


def test_what_does_not_depend_on_iterations_is_computed_once(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = ExoPipeline.from_pretrained(file, device="cpu")
    settings = {str(t): ExoSettings(num_steps=2, preserve=1.0, iterations=t) for t in (1, 2, 3)}
    alone = {
        name: measure_edits(pipeline, 5, 7, {name: own}, batch=3, objects="mixed")[name]
        for name, own in settings.items()
    }
    pipeline.prefixes.clear()
    pipeline.encoded.clear()
    counts = {"trunk reads": 0, "vae encodes": 0}

    def counted(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: object, **options: object) -> object:
            counts[name] += 1
            return call(*arguments, **options)

        return run

    monkeypatch.setattr(Exo, "encode", counted("trunk reads", Exo.encode))
    monkeypatch.setattr(Autoencoder, "encode", counted("vae encodes", Autoencoder.encode))
    together = measure_edits(pipeline, 5, 7, settings, batch=3, objects="mixed")
    assert counts == {"trunk reads": 2, "vae encodes": 5 + 2 * 5}  # of batches; of sources, and for the truth
    for name, found in together.items():
        assert {**found, "seconds_per_image": 0} == {**alone[name], "seconds_per_image": 0}


def test_command_with_a_tiny_model(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.json"
    arguments = ["--edits", "--models", str(file), "--count", "3", "--steps", "2", "--iterations", "1,2"]
    assert main([*arguments, "--json", str(out)]) == 0
    titles = [cell.strip() for cell in capsys.readouterr().out.splitlines()[0].split("|")][1:-1]
    assert {"model", "T", "mask IoU", "pixel IoU", "kept dB", "all"} <= set(titles)
    results = json.loads(out.read_text())["models"]
    assert list(results) == [f"{file} T=1", f"{file} T=2"]
    for number, result in enumerate(results.values(), start=1):
        assert (result["model"], result["iterations"], result["count"]) == (str(file), number, 3)
        for name in ("mask_iou", "pixel_iou"):
            assert 0 <= result[name] <= 1
        assert result["kept_psnr"] is None or result["kept_psnr"] > 0
        assert result["seconds_per_image"] > 0
        assert result["sampling"] == {
            "seed": 2026, "num_steps": 2, "cfg_scale": 2.0, "iterations": number, "preserve": 1.0,
        }  # fmt: skip
        assert 0 <= result["accuracy"]["all"] <= 1
    assert results[f"{file} T=1"]["vae_psnr"] == results[f"{file} T=2"]["vae_psnr"]


def test_iterations_of_plain_pictures(file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    arguments = ["--models", str(file), "--count", "2", "--steps", "2", "--iterations", "1,3"]
    assert main([*arguments, "--json", str(out)]) == 0
    results = json.loads(out.read_text())["models"]
    assert [result["iterations"] for result in results.values()] == [1, 3]
    assert "mask_iou" not in results[f"{file} T=1"]


def test_options_for_other_models_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(tiny.write_parts(tmp_path))
    for option in (["--edits"], ["--iterations", "1,2"]):
        assert main([*option, "--models", path, "--count", "2"]) == 2
        assert f"{option[0]} must be for exo models, got a xut model" in error_line(capsys)
    assert main(["--iterations", "1;2", "--models", path]) == 2
    assert "--iterations must be numbers with commas" in error_line(capsys)
