"""The project's own golden files hold, and the command notices whatever does not."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tests.golden.__main__ import OWN_FILES, main
from tests.golden.compare import Case, judge

FILES = sorted([*OWN_FILES.rglob("*.safetensors"), *OWN_FILES.rglob("*.json")])


def run(tmp_path: Path, *arguments: str) -> tuple[int, dict]:
    report = tmp_path / "report.json"
    code = main([*arguments, "--json", str(report)])
    return code, json.loads(report.read_text(encoding="utf-8"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}/{file.name}")
def test_own_file_holds(file: Path, tmp_path: Path) -> None:
    code, report = run(tmp_path, str(file))
    assert [case for case in report["cases"] if case["verdict"] != "passed"] == []
    assert code == 0
    assert report["passed"] > 0


@pytest.mark.parametrize(
    "file", [file for file in FILES if file.suffix == ".safetensors"], ids=lambda f: f.name
)
def test_altering_any_output_fails(file: Path, tmp_path: Path) -> None:
    """All outputs of a copy are altered at once: each must be a failed case of its own."""
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a mapping
    outputs = {name for name in tensors if name.startswith("output.")}
    for name in outputs:
        tensors[name] = alter(tensors[name])
    save_file(tensors, tmp_path / "any_name.safetensors", metadata)
    code, report = run(tmp_path, str(tmp_path / "any_name.safetensors"))
    assert {case["compared"] for case in report["cases"] if case["verdict"] == "failed"} >= outputs
    assert code == 1


def alter(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor with its largest element changed by a thousandth of itself, or by one if it is whole."""
    changed = tensor.clone()
    flat = changed.view(-1)
    index = flat.double().abs().nan_to_num(posinf=0).argmax()
    factor = 1.01 if tensor.dtype == torch.float16 else 1.001  # a unit in the last place is allowed there
    if tensor.dtype == torch.bool:
        flat[index] = ~flat[index]
    elif tensor.is_floating_point():
        flat[index] = flat[index] * factor + (flat[index] == 0)
    else:
        flat[index] += 1
    return changed


def test_output_that_nothing_computes_fails(tmp_path: Path) -> None:
    file = OWN_FILES / "flow" / "conversions_a.safetensors"
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a mapping
    tensors["output.unheard_of"] = torch.zeros(2)
    save_file(tensors, tmp_path / "more.safetensors", metadata)
    assert run(tmp_path, str(tmp_path / "more.safetensors"))[0] == 1


@pytest.mark.parametrize(
    "metadata", [{"arch": "unknown", "kind": "model"}, {"arch": "xut", "kind": "unknown"}, None]
)
def test_file_not_understood_fails(tmp_path: Path, metadata: dict[str, str] | None) -> None:
    save_file({"output.x": torch.zeros(2)}, tmp_path / "a.safetensors", metadata)
    code, report = run(tmp_path, str(tmp_path))
    assert (code, report["failed"], report["skipped"]) == (1, 1, 0)


@pytest.mark.parametrize("change", ["shape", "missing", "extra"])
@pytest.mark.parametrize("table", ["HDM-xut-340M-anime.single-file", "xut-small-640", "xut-small-640.jax"])
def test_changed_key_table_fails(tmp_path: Path, table: str, change: str) -> None:
    keys = json.loads((OWN_FILES / "xut" / f"{table}.keys.json").read_text(encoding="utf-8"))
    name = next(name for name in keys if name.endswith(("attn.out.bias", "sa.out.bias")))
    if change == "shape":
        keys[name] = [keys[name][0] + 1]
    elif change == "missing":
        del keys[name]
    else:
        keys[f"{name}s"] = keys[name]
    (tmp_path / "table.json").write_text(json.dumps(keys), encoding="utf-8")
    assert run(tmp_path, str(tmp_path / "table.json"))[0] == 1


@pytest.mark.parametrize(("dtype", "bound"), [("float16", 1e-2), ("bfloat16", 1e-1)])
def test_whole_models_in_half_precision(tmp_path: Path, dtype: str, bound: float) -> None:
    """In bfloat16 rounding the matrices alone moves these random models by 2 to 4 percent; the limit is 3."""
    _, report = run(tmp_path, *map(str, OWN_FILES.glob("xut/xudit_*.safetensors")), "--dtype", dtype)
    forwards = [case for case in report["cases"] if case["compared"].startswith("output.velocity")]
    assert len(forwards) == 5
    assert max(case["relative"] for case in forwards) < bound
    skipped = [case["compared"] for case in report["cases"] if case["verdict"] == "skipped"]
    assert {name.split(".")[1] for name in skipped} == {"debug", "sample", "train"}


def test_timing(tmp_path: Path) -> None:
    file = OWN_FILES / "xut" / "xudit_padded_context.safetensors"
    _, report = run(tmp_path, str(file), "--time", "1", "--backward")
    timed = [case for case in report["cases"] if case["seconds"] is not None]
    assert [case["compared"] for case in timed] == ["output.velocity"]
    assert timed[0]["backward_seconds"] > 0
    assert timed[0]["peak_mib"] > 0


def test_filter_by_architecture(tmp_path: Path) -> None:
    _, report = run(tmp_path, str(OWN_FILES / "flow"), str(OWN_FILES / "xut"), "--arch", "flow")
    assert {case["arch"] for case in report["cases"]} == {"flow"}
    assert main([str(OWN_FILES / "xut"), "--arch", "flow"]) == 2


def test_usage_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "nowhere")]) == 2
    assert main([str(tmp_path)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert all(line.startswith("error: PATH must") for line in lines)


def test_verdicts() -> None:
    one = torch.ones(3)
    spread = torch.tensor([0.0, 1.0, 2.0])  # standard deviation 1
    assert judge(Case("a", spread + 4e-5, spread)).reason == ""
    assert judge(Case("a", spread + 6e-5, spread)).reason
    assert judge(Case("a", one + 5e-7, one)).reason == ""  # constant: absolute
    assert judge(Case("a", one + 5e-6, one)).reason
    assert (
        judge(Case("a", torch.tensor([100.001]), torch.tensor([100.0]))).reason == ""
    )  # one element: its size
    assert judge(Case("a", torch.tensor([100.1]), torch.tensor([100.0]))).reason
    assert judge(Case("a", torch.tensor([1, 2]), torch.tensor([1, 2]))).reason == ""
    assert judge(Case("a", torch.tensor([1, 3]), torch.tensor([1, 2]))).reason
    assert judge(Case("a", torch.tensor([1.0, 2.0]), torch.tensor([1, 2]))).reason  # another dtype
    assert judge(Case("a", spread[:2], spread)).reason
    assert judge(Case("a", torch.tensor([torch.nan, 1, 2]), spread)).reason
    half = torch.tensor([1.0, -2.0, 0.0], dtype=torch.float16)
    assert judge(Case("a", torch.tensor([1.0009765625, -2.0, 0.0]), half)).reason == ""  # one unit
    assert judge(Case("a", torch.tensor([1.002, -2.0, 0.0]), half)).reason
