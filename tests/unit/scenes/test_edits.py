from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from training.scenes import (
    Edit,
    Scene,
    draw,
    is_held_out,
    iterate_edits,
    judge,
    parse_caption,
    random_edit,
    write_edits,
)
from training.scenes.cli import main
from training.scenes.edits import KINDS

EDITS = [edit for edit, _ in iterate_edits(240, 5, split="all")]


def named(scene: Scene) -> dict[str, object]:
    """Every attribute that a caption of the scene can name."""
    items = {
        f"{name}{i}": getattr(item, name)
        for i, item in enumerate(scene.objects)
        for name in ("shape", "color", "size", "position")
    }
    return {"background": scene.background, **items}


def differing(edit: Edit) -> set[str]:
    """Attributes in which source and target differ, without the object's number."""
    before, after = named(edit.source), named(edit.target)
    return {name.rstrip("01") for name in before if before[name] != after.get(name)}


def test_every_kind_occurs() -> None:
    assert set(Counter(edit.kind for edit in EDITS)) == set(KINDS)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "remove"])
def test_an_edit_changes_the_one_attribute_that_its_instruction_names(kind: str) -> None:
    for edit in (e for e in EDITS if e.kind == kind):
        assert differing(edit) == {kind}
        new = next(value for name, value in named(edit.target).items() if named(edit.source)[name] != value)
        assert str(new) in edit.instruction


def test_removing_leaves_the_other_object_where_it_was() -> None:
    removals = [edit for edit in EDITS if edit.kind == "remove"]
    for edit in removals:
        (left,) = edit.target.objects
        stays = next(item for item in edit.source.objects if item.color == left.color)
        gone = next(item for item in edit.source.objects if item.color != left.color)
        assert (left.center, left.radius, left.rgb) == (stays.center, stays.radius, stays.rgb)
        assert gone.shape in edit.instruction


def test_instructions_name_the_colour_where_two_objects_have_one_shape() -> None:
    alike = [
        edit
        for edit in EDITS
        if edit.kind != "background"
        and len(edit.source.objects) == 2
        and edit.source.objects[0].shape == edit.source.objects[1].shape
    ]
    assert alike
    for edit in alike:
        assert sum(item.color in edit.instruction for item in edit.source.objects) >= 1


def test_the_judge_finds_every_target_right_and_every_source_wrong() -> None:
    for edit in EDITS[:80]:
        assert judge(draw(edit.target), edit.caption)["all"], edit
        assert not judge(draw(edit.source), edit.caption)["all"], edit


def test_pixels_away_from_the_edited_object_stay() -> None:
    for edit in (e for e in EDITS if e.kind in ("color", "shape")):
        before, after = (np.asarray(draw(scene)).astype(int) for scene in (edit.source, edit.target))
        rows, columns = np.nonzero(np.abs(before - after).max(axis=2))
        item = next(a for a, b in zip(edit.source.objects, edit.target.objects, strict=True) if a != b)
        reach = 1.06 * item.radius * 128 + 1
        assert np.abs(columns + 0.5 - item.center[0] * 128).max() <= reach
        assert np.abs(rows + 0.5 - item.center[1] * 128).max() <= reach


@pytest.mark.parametrize("split", ["train", "test"])
def test_held_out_meanings_are_targets_of_the_test_split_alone(split: str) -> None:
    rng = np.random.default_rng(3)
    for _ in range(60):
        edit = random_edit(rng, split="train" if split == "train" else "test")
        assert is_held_out(edit.target) == (split == "test")
        assert split == "test" or not is_held_out(edit.source)


def test_a_share_of_the_texts_is_the_caption_of_the_target_but_not_in_the_test_split() -> None:
    captions = [(edit, text) for edit, text in iterate_edits(400, 1) if text != edit.instruction]
    assert 20 < len(captions) < 60
    assert all(judge(draw(edit.target), text)["all"] for edit, text in captions)
    assert all(text == edit.instruction for edit, text in iterate_edits(30, 1, split="test"))


def test_harder_kinds_are_learned_from_more_often_than_they_are_asked_for() -> None:
    learned, asked = (
        Counter(edit.kind for edit, _ in edits)
        for edits in (iterate_edits(400, 1), iterate_edits(400, 1, split="all"))
    )
    assert set(learned) == set(asked) == set(KINDS)
    assert learned["remove"] > 1.5 * asked["remove"]
    assert learned["color"] > asked["color"]


def test_an_edit_does_not_depend_on_the_count() -> None:
    assert list(iterate_edits(3, 9)) == list(iterate_edits(8, 9))[:3]
    assert list(iterate_edits(3, 9)) != list(iterate_edits(3, 8))


def test_folder_of_edits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--count", "5", "--seed", "2", "--edits", "--size", "64"]
    for name in ("a", "b"):
        assert main(["write", str(tmp_path / name), *arguments]) == 0
    assert capsys.readouterr().out.startswith(f"5 edits written to {tmp_path / 'a'}")
    names = {path.name for path in (tmp_path / "a").iterdir()}
    assert names == {
        f"edit-{i:06d}{ending}" for i in range(5) for ending in (".png", ".source.png", ".txt", ".json")
    }
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    edit, text = next(iterate_edits(1, 2))
    assert (tmp_path / "a" / "edit-000000.txt").read_text() == text + "\n"
    facts = json.loads((tmp_path / "a" / "edit-000000.json").read_text())
    assert facts == {
        "kind": edit.kind,
        "instruction": edit.instruction,
        "target": edit.caption,
        "answer": edit.answer,
    }


def test_the_answer_is_what_the_source_shows_then_what_is_to_change_and_then_the_target() -> None:
    for edit in EDITS:
        seen, subject, last = edit.answer.split("\n")
        assert judge(draw(edit.source), seen)["all"]
        if edit.kind != "remove":
            assert last == edit.caption
        if edit.kind == "background":
            assert subject == "the background"
            continue
        name, _, following = subject.rpartition(" ")
        assert f"{name} " in f"{edit.instruction} "
        (changed,) = (
            item
            for item in edit.source.objects
            if item not in edit.target.objects
            and (edit.kind != "remove" or all(item.center != left.center for left in edit.target.objects))
        )
        assert f"{changed.color} {changed.shape} {following} " in seen


def test_the_answer_leaves_out_the_place_of_what_is_left_of_two() -> None:
    for edit in (edit for edit in EDITS if edit.kind == "remove"):
        said, meant = parse_caption(edit.answer.split("\n")[-1]), parse_caption(edit.caption)
        assert meant.objects[0].position
        assert said == replace(meant, objects=(replace(meant.objects[0], position=None),))


def test_judge_reads_the_target_caption_of_edits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_edits(tmp_path / "a", 5, 2, split="test", is_quiet=True)
    assert main(["judge", str(tmp_path / "a")]) == 0
    assert capsys.readouterr().out.splitlines()[-1].split() == ["all", "1.0000", "5"]
    (tmp_path / "a" / "edit-000001.json").write_text("{}")
    assert main(["judge", str(tmp_path / "a")]) == 2
    assert "edit-000001.json must be JSON with the caption of the target" in capsys.readouterr().err
