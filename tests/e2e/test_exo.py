"""Exo from the command line: pictures, edits, masks, and what users do wrong with trunks."""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import flowcore
from flowcore.models.exo.trunk import build_trunk
from flowcore.models.exo.trunk_config import TRUNKS
from flowcore.weights.exo import load_trunk, save_exo
from tests import tiny, tiny_exo
from tests.e2e.test_generate import cli, failure, pixels
from tests.exo_recomputed import random_exo

PROMPT = "make the circle green"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_exo.write_parts(tmp_path_factory.mktemp("exo"))


@pytest.fixture
def picture_file(tmp_path: Path) -> Path:
    Image.effect_noise((67, 41), 90).convert("RGB").save(tmp_path / "start.png")
    return tmp_path / "start.png"


def test_an_edit_its_mask_and_settings_that_reproduce_both(
    model: Path, picture_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, mask = tmp_path / "out.png", tmp_path / "mask.png"
    options = ["--init", picture_file, "--iterations", 3, "--preserve", 0.5, "--eta", 0.25, "--steps", 3]
    options += ["--strength", 0.9, "--mask-out", mask, "--quiet", "--device", "cpu"]
    assert cli(PROMPT, "--model", model, "--out", out, *options) == 0
    assert capsys.readouterr().out.splitlines() == [str(out), str(mask)]
    with Image.open(out) as image, Image.open(mask) as edits:
        assert (image.size, image.mode) == (edits.size, image.mode) == ((64, 40), "RGB")
        assert edits.mode == "L"
        assert edits.getextrema()[0] < edits.getextrema()[1]
    settings = flowcore.read_settings(out)
    expected = {
        "iterations": 3,
        "preserve": 0.5,
        "eta": 0.25,
        "strength": 0.9,
        "shift": 3.0,
        "cfg_scale": 4.0,
    }
    assert {name: settings[name] for name in expected} == expected
    first = pixels(out), pixels(mask)
    out.unlink()
    mask.unlink()
    assert cli(*shlex.split(settings["command"])[3:]) == 0
    assert (pixels(out), pixels(mask)) == first


def test_the_words_that_were_drawn_are_stated_and_make_the_same_picture(
    picture_file: Path, tmp_path: Path
) -> None:
    model = tiny_exo.write_parts(tmp_path, changes={"rewrites": True})
    first, second = tmp_path / "first.png", tmp_path / "second.png"
    options = ["--model", model, "--init", picture_file, "--steps", 1, "--quiet", "--device", "cpu"]
    assert cli(PROMPT, *options, "--out", first) == 0
    stated = flowcore.read_settings(first)
    assert stated["prompt"] == PROMPT
    assert stated["rewritten"] not in (PROMPT, "")
    assert cli(stated["rewritten"], *options, "--no-rewrite", "--out", second) == 0
    assert pixels(first) == pixels(second)
    assert "rewritten" not in flowcore.read_settings(second)


def test_one_line_warns_of_iterations_beyond_the_training(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--out", tmp_path / "out.png", "--steps", 1, "--count", 5, "--quiet", "--iterations"]
    for count, expected in ((4, 0), (6, 1)):
        assert cli(PROMPT, "--model", model, *options, count) == 0
        lines = [line for line in capsys.readouterr().err.splitlines() if line]
        assert len(lines) == expected  # two batches
    assert lines == [
        "warning: iterations should be at most 4, as in the training of exo.safetensors, got 6; "
        "pictures and masks get worse beyond"
    ]


def test_defaults_are_those_of_exo(model: Path, picture_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.png"
    options = ["--steps", 2, "--count", 2, "--quiet", "--mask-out", tmp_path / "m.png"]
    assert cli(PROMPT, "--model", model, "--init", picture_file, "--out", out, *options) == 0
    found = flowcore.read_settings(tmp_path / "out-1.png")
    expected = {"strength": 1.0, "iterations": 4, "schedule": "shift", "solver": "euler"}
    assert {name: found[name] for name in expected} == expected
    assert (tmp_path / "m-0.png").is_file()
    assert pixels(tmp_path / "m-0.png") != pixels(tmp_path / "m-1.png")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--iterations", 9], r"iterations must lie in 1\.\.8, got 9"),
        (["--preserve", 1], "preserve must be 0 without an initial image, got 1"),
        (["--eta", 2], r"eta must lie in \[0, 1\], got 2"),
        (["--schedule", "cos"], "schedule must be one of shift, flux2, got 'cos'"),
        (["--mask-out", "m.jpg"], r"must end in \.png"),
        (["--model", "XUT", "--iterations", 2], "--iterations must go with an exo model, got xut"),
        (["--model", "XUT", "--no-rewrite"], "--rewrite must go with an exo model, got xut"),
        (["--model", "XUT", "--mask-out", "m.png"], "--mask-out must go with an exo model, got xut"),
        (["--text-encoder", "OTHER"], "must be a dense Qwen3-VL .*, got llama; give the folder"),
        (["--text-encoder", "NO_PROCESSOR"], r"must come with its processor, got no tokenizer\.json"),
        (["--text-encoder", "OTHER_WEIGHTS"], "made for another trunk, pass that one"),
        (["--text-encoder", "nowhere"], "the trunk nowhere must be a folder, or a repository in the Hugging"),
    ],
)
def test_what_users_do_wrong_is_one_line_and_code_2(
    options: list[object],
    message: str,
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    places: dict[object, object] = {}
    if "--text-encoder" in options:
        model = write_reference(tmp_path, str(options[1]))
        places[options[1]] = tmp_path / "trunk" if str(options[1]).isupper() else options[1]
    if "XUT" in options:
        places["XUT"] = tiny.write_parts(tmp_path)
    given = [places.get(option, option) for option in options]
    code, line = failure(capsys, PROMPT, "--model", model, "--out", tmp_path / "o.png", "--quiet", *given)
    assert code == 2
    assert re.search(message, line), line


def write_reference(folder: Path, fault: str) -> Path:
    """A file whose trunk lies beside it in a folder with something wrong; return the file."""
    trunk, config = folder / "trunk", dict(TRUNKS["tiny"])
    trunk.mkdir()
    if fault == "NO_PROCESSOR":  # token ids of a published trunk, which comes with a tokenizer
        config = {**config, "image_token_id": 500}
    torch.manual_seed(5)
    network = build_trunk(config)
    save_file({f"model.{name}": t for name, t in network.state_dict().items()}, trunk / "model.safetensors")
    (trunk / "config.json").write_text(json.dumps({"model_type": "qwen3_vl", **config}))
    exo = random_exo(embeds_trunk=False, trunk=config)
    exo.attach(load_trunk(trunk))
    tiny_exo.write_vae(folder)
    save_exo(folder / "exo.safetensors", exo, trunk=str(trunk), metadata={"flowcore.vae": tiny_exo.VAE})
    if fault == "OTHER":
        (trunk / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 64}))
    if fault == "OTHER_WEIGHTS":
        with torch.no_grad():
            network.language_model.norm.weight.mul_(2)
        save_file(network.state_dict(), trunk / "model.safetensors")
    return folder / "exo.safetensors"


def test_a_trunk_by_reference_makes_pictures(tmp_path: Path) -> None:
    model = write_reference(tmp_path, "")
    common = ["--model", model, "--steps", 1, "--iterations", 1, "--width", 32, "--height", 32, "--quiet"]
    assert cli(PROMPT, *common, "--out", tmp_path / "named.png") == 0
    (tmp_path / "trunk").rename(tmp_path / "moved")
    given = ["--text-encoder", tmp_path / "moved"]
    assert cli(PROMPT, *common, *given, "--out", tmp_path / "given.png") == 0
    assert pixels(tmp_path / "named.png") == pixels(tmp_path / "given.png")
    assert flowcore.read_settings(tmp_path / "given.png")["text_encoder"] == str(tmp_path / "moved")
