"""The flow-matching objective: keyed draws, accumulation, dropout of captions, previews."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from flowcore.conditioning import Conditioning
from flowcore.errors import ConfigError
from tests.unit.training.workspace import SIZES, run_config, write_images
from training.assemble import build_objective, prepare
from training.objectives.flow_matching import FlowMatchingObjective
from training.stop import StopFlag, StoppedError

CPU = torch.device("cpu")


def objective(folder: Path, judge: object = None, **sections: dict[str, object]) -> FlowMatchingObjective:
    if not (folder / "images").exists():
        write_images(folder / "images", 9, SIZES)
    config = run_config(folder, **{"buckets": {"resolution": 64}, **sections})
    made = build_objective(prepare(config), CPU, StopFlag(), judge)  # type: ignore[arg-type]
    with torch.no_grad():  # the output and the modulation start at zero
        for number, parameter in enumerate(made.module.parameters()):
            parameter.add_(
                0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
            )
    return made


def gradients(made: FlowMatchingObjective) -> list[Tensor]:
    found = [p.grad.clone() for p in made.module.parameters() if p.grad is not None]
    made.module.zero_grad(set_to_none=True)
    return found


def test_the_loss_depends_on_the_step_alone(tmp_path: Path) -> None:
    made = objective(tmp_path)
    first = [float(made.loss(step, slice(0, 4)).detach()) for step in range(3)]
    torch.manual_seed(99)
    again = [float(made.loss(step, slice(0, 4)).detach()) for step in reversed(range(3))]
    assert first == again[::-1]
    assert len(set(first)) == 3


@pytest.mark.parametrize("size", [1, 2])
def test_parts_of_a_batch_add_up_to_the_whole(tmp_path: Path, size: int) -> None:
    made = objective(tmp_path)
    made.loss(1, slice(0, 4)).backward()
    whole = gradients(made)
    for start in range(0, 4, size):
        (made.loss(1, slice(start, start + size)) * size / 4).backward()
    for part, full in zip(gradients(made), whole, strict=True):
        assert (part - full).abs().max() <= 1e-4 * full.abs().max()  # float32 sums in another order


def test_checkpointing_changes_nothing(tmp_path: Path) -> None:
    plain, saving = objective(tmp_path), objective(tmp_path, train={"gradient_checkpointing": True})
    for made in (plain, saving):
        made.loss(0, slice(0, 4)).backward()
    for part, full in zip(gradients(saving), gradients(plain), strict=True):
        assert torch.allclose(part, full, rtol=1e-5, atol=1e-7)


def watch_captions(made: FlowMatchingObjective, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The captions that the model is told from now on, the empty one for those that are dropped."""
    asked: list[str] = []
    conditioning = made.data.conditioning

    def watched(numbers: list[int], dropped: list[bool]) -> Conditioning:
        captions = [made.data.samples[number].caption for number in numbers]
        asked.extend("" if drop else text for text, drop in zip(captions, dropped, strict=True))
        return conditioning(numbers, dropped)

    monkeypatch.setattr(made.data, "conditioning", watched)
    return asked


def test_captions_are_dropped_at_their_rate_and_by_sample(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = objective(tmp_path, train={"cond_dropout": 0.25})
    asked = watch_captions(made, monkeypatch)
    for step in range(60):
        with torch.no_grad():
            made.loss(step, slice(0, 2))
            made.loss(step, slice(2, 4))
    assert 0.17 < asked.count("") / len(asked) < 0.33
    parts = asked.copy()
    asked.clear()
    with torch.no_grad():
        made.loss(0, slice(0, 4))
    assert asked == parts[:4]


@pytest.mark.parametrize(("rate", "expected"), [(0.0, set()), (1.0, {""})])
def test_no_caption_or_every_caption_is_dropped(
    tmp_path: Path, rate: float, expected: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = objective(tmp_path, train={"cond_dropout": rate})
    asked = watch_captions(made, monkeypatch)
    with torch.no_grad():
        made.loss(0, slice(0, 4))
    assert {caption for caption in asked if not caption} == expected


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_twenty_levels_are_drawn_equally_often(tmp_path: Path, shift: float) -> None:
    made = objective(tmp_path, train={"timesteps": {"law": "linear20", "shift": shift}})
    found = made.recipe.levels(torch.arange(200, dtype=torch.float64) / 200)
    nodes = torch.arange(20, dtype=torch.float64) / 19
    assert torch.allclose(found.reshape(20, 10), (shift * nodes / (1 + (shift - 1) * nodes))[:, None])
    drawn = torch.cat([made.draw(step, slice(0, 4)).sigma for step in range(20)])
    assert all(torch.isclose(found.float(), level, atol=2e-4).any() for level in drawn)


def test_batches_have_one_size_and_names(tmp_path: Path) -> None:
    made = objective(tmp_path)
    for step in range(8):
        bucket, keys = made.batch_keys(step)
        numbers = made.samples(step)
        assert keys == [made.data.samples[number].key for number in numbers]
        assert {f"{made.data.buckets[n].width}x{made.data.buckets[n].height}" for n in numbers} == {bucket}


def test_a_preview_is_a_grid_judged(tmp_path: Path) -> None:
    seen: list[tuple[Tensor, list[str]]] = []

    def judge(images: Tensor, captions: list[str]) -> dict[str, float]:
        seen.append((images, list(captions)))
        return {"x": 0.5}

    sampling = {"steps": 2, "prompts": ["a", "b"], "size": [32, 48]}
    made = objective(tmp_path, judge, sampling=sampling)
    with torch.no_grad():
        assert made.preview(tmp_path, 7, StopFlag()) == {"x": 0.5}
    assert seen[0][0].shape == (2, 3, 48, 32)
    assert seen[0][1] == ["a", "b"]
    assert seen[0][0].abs().max() <= 1
    with Image.open(tmp_path / "step-00000007.png") as image:
        assert image.size == (2 * 34, 50)


def test_samples_depend_on_their_number_not_on_their_batch(tmp_path: Path) -> None:
    made = objective(tmp_path, sampling={"steps": 2})
    with torch.no_grad():
        together = made.sample(["a", "b", "c"], StopFlag())
        alone = made.sample(["c"], StopFlag(), first=2)
    assert torch.allclose(together[2], alone[0], atol=1e-4)


def test_a_stop_ends_a_preview(tmp_path: Path) -> None:
    stop = StopFlag()
    stop.requested = True
    made = objective(tmp_path)
    with torch.no_grad(), pytest.raises(StoppedError):
        made.preview(tmp_path, 1, stop)


def test_errors_of_other_captions_are_of_the_same_noise(tmp_path: Path) -> None:
    made = objective(tmp_path)
    with torch.no_grad():
        own, same, other = made.errors([0, 0, 0], ["picture 0", "picture 0", "a word more"], 0.9)
        alone = made.errors([0], ["picture 0"], 0.9)
        low = made.errors([0], ["picture 0"], 0.1)
    assert own == same
    assert abs(own - other) > 1e-7
    assert torch.allclose(alone[0], own, rtol=1e-4)
    assert not torch.allclose(low[0], own, rtol=1e-2)


def test_a_compiled_model_is_what_is_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def compiled(call: Callable[..., Tensor], **_: object) -> Callable[..., Tensor]:
        def run(*given: object, **named: object) -> Tensor:
            calls.append(1)
            return call(*given, **named)

        return run

    plain = objective(tmp_path).loss(0, slice(0, 4))
    monkeypatch.setattr("torch._inductor.cpp_builder.get_cpp_compiler", lambda: "c++")
    monkeypatch.setattr(torch, "compile", compiled)
    made = objective(tmp_path, train={"steps": 1, "batch_size": 4, "compile": True})
    assert not calls
    assert torch.equal(made.loss(0, slice(0, 4)), plain)
    assert len(calls) == 1


def test_compiling_needs_a_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", (None, str(tmp_path / "no-compiler")))
    with pytest.raises(ConfigError, match=r"train\.compile must be false on a CPU without a C\+\+ compiler"):
        objective(tmp_path, train={"steps": 1, "batch_size": 4, "compile": True})
