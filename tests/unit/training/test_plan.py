"""The plan: bytes, buckets and warnings."""

from pathlib import Path

import pytest

from tests.unit.training.workspace import SIZES, run_config, write_images
from training.assemble import prepare
from training.data.sample import DataError
from training.plan import describe, make_plan
from training.stop import StopFlag, StoppedError


def plan(folder: Path, **sections: dict[str, object]) -> dict[str, object]:
    if not (folder / "images").exists():
        write_images(folder / "images", 9, SIZES)
    return make_plan(prepare(run_config(folder, **sections)))


def memory(folder: Path, **sections: dict[str, object]) -> dict[str, int]:
    parts = plan(folder, **sections)["memory"]
    assert isinstance(parts, dict)
    assert parts["total"] == sum(parts.values()) - parts["total"]
    return parts


def test_bytes_of_a_parameter(tmp_path: Path) -> None:
    parameters = plan(tmp_path)["parameters"]
    assert isinstance(parameters, int)
    parts = memory(tmp_path)
    assert parts["weights"] == parts["gradients"] == parts["ema"] == 4 * parameters
    assert parts["optimizer"] == 8 * parameters
    assert memory(tmp_path, ema={"decay": None})["ema"] == 0
    assert memory(tmp_path, optimizer={"name": "sgd"})["optimizer"] == 4 * parameters


def test_activations_grow_with_the_micro_batch_and_shrink_with_checkpointing(tmp_path: Path) -> None:
    one, four = (memory(tmp_path, train={"micro_batch_size": n})["activations"] for n in (1, 4))
    assert 3 * one < four < 5 * one
    less = memory(tmp_path, train={"gradient_checkpointing": True})["activations"]
    assert 0 < less < four / 2
    assert memory(tmp_path, precision="bfloat16")["activations"] < four  # type: ignore[arg-type]


def test_memory_is_that_of_one_process(tmp_path: Path) -> None:
    write_images(tmp_path / "images", 9, SIZES)
    plans = {}
    for strategy, processes in (("none", 1), ("ddp", 2), ("fsdp2", 2), ("zero3", 2), ("zero2", 2)):
        prepared = prepare(run_config(tmp_path, distributed={"strategy": strategy}))
        plans[strategy] = make_plan(prepared, processes)
    one, ddp, fsdp2, zero3, zero2 = (plan["memory"] for plan in plans.values())
    states = ("weights", "gradients", "optimizer", "ema")
    assert [ddp[name] for name in states] == [one[name] for name in states]
    assert [2 * fsdp2[name] for name in states] == [one[name] for name in states]
    assert zero3 == fsdp2
    assert [zero2[name] for name in states] == [
        one["weights"],
        one["gradients"] / 2,
        one["optimizer"] / 2,
        one["ema"],
    ]
    assert ddp["activations"] == fsdp2["activations"] < one["activations"]
    assert fsdp2["total"] == sum(fsdp2.values()) - fsdp2["total"]
    assert "memory of each of 2 processes: weights" in describe(plans["fsdp2"], 2)
    assert "memory: weights" in describe(plans["none"])


def test_buckets_and_epochs(tmp_path: Path) -> None:
    found = plan(tmp_path, buckets={"resolution": 64}, train={"steps": 18})
    assert found["buckets"] == [
        {"width": 48, "height": 80, "images": 3},
        {"width": 64, "height": 64, "images": 3},
        {"width": 80, "height": 48, "images": 3},
    ]
    assert (found["images"], found["epochs"], found["steps"]) == (9, 8.0, 18)


def test_repeats_count_as_images(tmp_path: Path) -> None:
    write_images(tmp_path / "images", 3)
    sections = {"datasets": [{"path": str(tmp_path / "images"), "repeats": 4}]}
    assert plan(tmp_path, **sections)["images"] == 12  # type: ignore[arg-type]


def warnings_of(folder: Path, **sections: dict[str, object]) -> list[str]:
    found = plan(folder, **sections)["warnings"]
    assert isinstance(found, list)
    return found


def test_warnings(tmp_path: Path) -> None:
    square = {"datasets": [{"path": str(write_images(tmp_path / "images", 8))}]}
    assert warnings_of(tmp_path, **square) == []  # type: ignore[arg-type]
    assert warnings_of(tmp_path, train={"batch_size": 16}) == [
        "bucket 32x32 holds 8 images, fewer than the batch of 16: a batch will hold some of them twice"
    ]
    assert warnings_of(tmp_path, buckets={"resolution": 64}) == [
        "8 images are enlarged more than 1.5 times; lower buckets.resolution"
    ]
    write_images(tmp_path / "images", 9, [(80, 32)])
    assert warnings_of(tmp_path, buckets={"max_aspect": 1.0}) == [
        "9 images lose more than a third of their area; raise buckets.max_aspect"
    ]
    (tmp_path / "images" / "00.txt").unlink()
    assert (
        warnings_of(
            tmp_path, buckets={"resolution": 32, "max_aspect": 8.0}, data={"missing_caption": "skip"}
        )[-1]
        == "1 files are left out; they will be listed in rejects.csv"
    )


def test_random_weights_are_told_of(tmp_path: Path) -> None:
    sections = {"model": {"preset": "demo"}, "encoders": {"vae": "pixels", "text": "bytes"}}
    assert "training starts from random weights: model.weights is not given" in warnings_of(
        tmp_path, **sections
    )  # type: ignore[arg-type]


def test_words_for_a_person(tmp_path: Path) -> None:
    text = describe(plan(tmp_path, buckets={"resolution": 64}))
    assert "9 images in 3 buckets" in text
    assert "  48x80: 3 images" in text
    assert text.isascii()


def test_an_empty_folder_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    with pytest.raises(DataError):
        plan(tmp_path)


def test_a_stop_is_heeded(tmp_path: Path) -> None:
    stop = StopFlag()
    stop.requested = True
    write_images(tmp_path / "images")
    with pytest.raises(StoppedError):
        prepare(run_config(tmp_path), stop)
