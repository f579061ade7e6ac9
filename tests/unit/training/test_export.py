"""`training.export`."""

from pathlib import Path

import pytest
import torch

from flowcore.weights.checkpoint import load_model
from tests.unit.training.workspace import error_line, run, tree, weights, write_config
from training.export import main
from training.state import Checkpoint


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a short run."""
    folder = tmp_path_factory.mktemp("export")
    assert run(write_config(folder, train={"steps": 2}, checkpoint={"every_steps": 1})) == 0
    return folder / "runs" / "run"


@pytest.mark.parametrize("name", ["model", "ema"])
def test_it_writes_what_the_run_wrote_at_its_end(
    finished: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = tree(finished)
    out = tmp_path / "new" / "out.safetensors"
    assert main([str(finished), str(out), *(["--ema"] if name == "ema" else [])]) == 0
    found, wanted = weights(out), weights(finished / "final" / f"{name}.safetensors")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], value) for key, value in wanted.items())
    assert capsys.readouterr().out == f"{out}: step 2\n"
    assert load_model(out).architecture.name == "xut"
    assert tree(finished) == before


def test_it_converts(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    assert main([str(finished), str(out), "--dtype", "bfloat16"]) == 0
    assert {tensor.dtype for tensor in weights(out).values()} == {torch.bfloat16}


def test_it_takes_the_checkpoint_of_a_step(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.safetensors"
    assert main([str(finished), str(out), "--step", "1"]) == 0
    assert capsys.readouterr().out == f"{out}: step 1\n"
    last = weights(finished / "final" / "model.safetensors")
    assert any(not torch.equal(tensor, last[key]) for key, tensor in weights(out).items())
    assert main([str(finished), str(out), "--step", "7"]) == 2
    assert "--step must be that of a checkpoint" in error_line(capsys)


def test_it_takes_the_newest_sound_checkpoint(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = finished / "checkpoints" / "step-00000002" / "manifest.json"
    content = path.read_bytes()
    path.write_bytes(b"")
    try:
        assert main([str(finished), str(tmp_path / "out.safetensors")]) == 0
    finally:
        path.write_bytes(content)
    captured = capsys.readouterr()
    assert captured.out.endswith("step 1\n")
    assert captured.err.startswith("warning: ")


def test_a_checkpoint_that_a_running_run_deletes_is_replaced_by_the_next(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors, calls = Checkpoint.tensors, []

    def gone(checkpoint: Checkpoint, name: str) -> dict[str, torch.Tensor]:
        calls.append(name)
        if len(calls) == 1:
            raise FileNotFoundError(2, "No such file", "weights.safetensors")
        return tensors(checkpoint, name)

    monkeypatch.setattr(Checkpoint, "tensors", gone)
    assert main([str(finished), str(tmp_path / "out.safetensors")]) == 0
    assert len(calls) == 2
    assert "step 2" in capsys.readouterr().out


def test_what_a_running_run_is_writing_is_left_alone(finished: Path, tmp_path: Path) -> None:
    half = finished / "checkpoints" / ".tmp-3-1"
    half.mkdir()
    assert main([str(finished), str(tmp_path / "out.safetensors")]) == 0
    half.rmdir()


def test_mistakes_are_one_line(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out.safetensors")
    assert main([str(finished), str(tmp_path / "out.bin")]) == 2
    assert "OUT must end in .safetensors" in error_line(capsys)
    assert main([str(tmp_path), out]) == 2
    assert "config.yaml: configuration must exist" in error_line(capsys)
    config = (finished / "config.yaml").read_text(encoding="utf-8")
    (tmp_path / "config.yaml").write_text(config, encoding="utf-8")
    assert main([str(tmp_path), out]) == 2
    assert "the run folder must hold a checkpoint, found none" in error_line(capsys)
    (tmp_path / "config.yaml").write_text(config.replace("decay: 0.9", "decay: null"), encoding="utf-8")
    assert main([str(tmp_path), out, "--ema"]) == 2
    assert "--ema needs a run with ema.decay" in error_line(capsys)


def test_a_failed_write_is_a_failure(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from flowcore.weights import atomic

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(atomic, "save_file", full)
    assert main([str(finished), str(tmp_path / "out.safetensors")]) == 1
    assert "out.safetensors" in error_line(capsys)
    assert list(tmp_path.iterdir()) == []
