from __future__ import annotations

import json
from pathlib import Path

import pytest

from training.scenes.cli import main


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def write(folder: Path, *more: str) -> int:
    return main(["write", str(folder), "--count", "6", "--seed", "3", *more])


def error(capsys: pytest.CaptureFixture[str]) -> str:
    """The one error line on stderr."""
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    return lines[0]


def test_equal_seeds_write_equal_files_and_other_seeds_do_not(tmp_path: Path) -> None:
    assert write(tmp_path / "a") == 0
    assert write(tmp_path / "b") == 0
    assert main(["write", str(tmp_path / "c"), "--count", "6", "--seed", "4"]) == 0
    assert len(files(tmp_path / "a")) == 12
    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert files(tmp_path / "a") != files(tmp_path / "c")


def test_scene_does_not_depend_on_the_count(tmp_path: Path) -> None:
    write(tmp_path / "a")
    main(["write", str(tmp_path / "b"), "--count", "3", "--seed", "3"])
    assert files(tmp_path / "b").items() <= files(tmp_path / "a").items()


def test_written_scenes_are_judged_right(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "a", "--size", "96")
    capsys.readouterr()
    assert main(["judge", str(tmp_path / "a"), "--json", str(tmp_path / "out.json")]) == 0
    table = capsys.readouterr().out.splitlines()
    assert table[0].split() == ["attribute", "accuracy", "images"]
    assert table[-1].split() == ["all", "1.0000", "6"]
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["count"] == 6
    assert list(result["accuracy"]) == ["color", "background", "shape", "position", "size", "relation", "all"]
    assert result["accuracy"]["all"] == 1
    assert set(result["images"][0]) == {"file", "caption", *result["accuracy"]}


def test_folder_with_files_is_refused_until_forced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    assert write(tmp_path) == 2
    assert error(capsys) == (
        f"error: {tmp_path} must be empty, got a folder with files; name another or add --force"
    )
    assert write(tmp_path, "--force") == 0
    assert (tmp_path / "mine.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--count", "0"], "count must be at least 1, got 0"),
        (["--seed", "-1"], "seed must be 0 or more, got -1"),
        (["--size", "8"], "size must be 32 to 4096 pixels, got 8"),
        (["--count", "many"], "argument --count: invalid int value: 'many'"),
        (["--objects", "three"], "argument --objects: invalid choice: 'three'"),
        (["--colour"], "unrecognized arguments: --colour"),
    ],
)
def test_unusable_arguments(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert write(tmp_path / "new", *arguments) == 2
    assert message in error(capsys)
    assert not (tmp_path / "new").exists()


def test_a_file_in_place_of_the_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert write(tmp_path / "file") == 2
    assert "must be a folder, got a file" in error(capsys)
    assert write(tmp_path / "file" / "below") == 2
    assert "must be a folder that can be made" in error(capsys)


def test_judge_names_the_file_and_the_remedy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def judged(folder: Path, *more: str) -> str:
        capsys.readouterr()
        assert main(["judge", str(folder), *more]) == 2
        return error(capsys)

    assert "got no folder; check the path" in judged(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "must hold PNG files, got none" in judged(tmp_path / "empty")
    write(tmp_path / "a")
    caption, picture = tmp_path / "a" / "scene-000002.txt", tmp_path / "a" / "scene-000002.png"
    assert "--json must lie in an existing folder" in judged(
        tmp_path / "a", "--json", str(tmp_path / "no" / "f")
    )
    caption.write_text("a photo of a cat")
    assert f"{picture}: caption must describe a scene, got 'a photo of a cat'" in judged(tmp_path / "a")
    caption.write_bytes(b"\xff\xfe\xff")
    assert f"{caption} must be readable UTF-8 text" in judged(tmp_path / "a")
    caption.unlink()
    assert f"{picture} must have a caption, got no scene-000002.txt" in judged(tmp_path / "a")
    caption.write_text("a red circle")
    picture.write_bytes(picture.read_bytes()[:100])
    assert f"{picture} must be an image that decodes" in judged(tmp_path / "a")


def test_debug_shows_the_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["judge", str(tmp_path / "nowhere"), "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err
