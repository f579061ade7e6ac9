"""Prompt to picture with tiny random parts: the command line, the Python call, and what users do wrong."""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import flowcore
from flowcore.__main__ import main
from flowcore.flow import SOLVERS
from flowcore.pipeline import Pipeline
from flowcore.settings import Settings
from tests import tiny
from tests.support import run_python

PROMPT = "a red circle left of a blue square"


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parts")
    tiny.write_parts(folder)
    return folder


@pytest.fixture(scope="module")
def pipeline(parts: Path) -> Pipeline:
    return Pipeline.from_files(parts / tiny.MODEL, device="cpu")


@pytest.fixture
def picture_file(tmp_path: Path) -> Path:
    """A picture with a gradient, of a size that is no multiple of 8."""
    image = Image.new("RGB", (45, 37))
    image.putdata([(x * 5, y * 6, 128) for y in range(37) for x in range(45)])
    image.save(tmp_path / "start.png")
    return tmp_path / "start.png"


def cli(*arguments: object) -> int:
    """Exit code of the command line in this process."""
    try:
        return main([str(argument) for argument in arguments])
    except SystemExit as stop:
        return int(stop.code or 0)


def pixels(path: Path | str) -> bytes:
    with Image.open(path) as image:
        return image.tobytes()


def failure(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    """Exit code and the one line that a failing command prints."""
    code = cli(*arguments)
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("error: ")
    return code, lines[0]


def test_the_command_as_users_run_it(parts: Path, tmp_path: Path) -> None:
    out = tmp_path / "made" / "out.png"
    command = [
        "-m",
        "flowcore",
        PROMPT,
        "--model",
        str(parts / tiny.MODEL),
        "--out",
        str(out),
        "--steps",
        "3",
    ]
    result = run_python(*command)
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"{out}\n"
    assert "3/3" in result.stderr
    first = pixels(out)
    result = run_python(*command)
    assert result.returncode == 0, result.stderr
    assert pixels(out) == first
    with Image.open(out) as image:
        assert (image.size, image.mode) == ((32, 24), "RGB")


def test_picture_carries_its_settings_and_they_reproduce_it(
    parts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.png"
    options = [
        "--steps",
        3,
        "--cfg",
        2.5,
        "--seed",
        7,
        "--solver",
        "heun",
        "--shift",
        2,
        "--negative",
        "a green",
    ]
    options += ["--width", 40, "--height", 16, "--cfg-rescale", 0.5, "--quiet", "--device", "cpu"]
    assert cli(PROMPT, "--model", parts / tiny.MODEL, "--out", out, *options) == 0
    settings = flowcore.read_settings(out)
    expected = {
        "prompt": PROMPT,
        "negative_prompt": "a green",
        "seed": 7,
        "width": 40,
        "height": 16,
        "num_steps": 3,
        "cfg_scale": 2.5,
        "cfg_rescale": 0.5,
        "solver": "heun",
        "shift": 2.0,
        "strength": 1.0,
        "model": str(parts / tiny.MODEL),
        "vae": str(parts / tiny.VAE),
        "text_encoder": str(parts / tiny.TEXT),
        "text_mode": "sequence",
        "dtype": "float32",
        "device": "cpu",
        "flowcore": flowcore.__version__,
    }
    assert {name: settings[name] for name in expected} == expected
    first = pixels(out)
    out.unlink()
    assert cli(*shlex.split(settings["command"])[3:]) == 0
    assert pixels(out) == first
    capsys.readouterr()
    assert cli("inspect", out) == 0
    assert json.loads(capsys.readouterr().out)["settings"] == settings


# Random weights make a stiff field, on which the adaptive solvers take thousands of steps.
@pytest.mark.parametrize("solver", sorted(set(SOLVERS) - {"bosh3", "dopri5"}))
def test_every_solver_makes_a_picture_of_its_seed(pipeline: Pipeline, solver: str) -> None:
    settings = Settings(num_steps=4, solver=solver, width=16, height=16)
    first, again, other = (pipeline.generate([PROMPT], [seed], settings)[0].tobytes() for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_python_call_equals_the_command_line(parts: Path, pipeline: Pipeline, tmp_path: Path) -> None:
    image = flowcore.generate(PROMPT, model=pipeline, num_steps=3, seed=5)
    flowcore.save_image(image, tmp_path / "python.png")
    out = tmp_path / "cli.png"
    assert cli(PROMPT, "--model", parts / tiny.MODEL, "--out", out, "--steps", 3, "--seed", 5, "--quiet") == 0
    assert pixels(tmp_path / "python.png") == pixels(out)
    assert flowcore.read_settings(tmp_path / "python.png")["seed"] == 5


def test_several_pictures_have_their_own_seeds_and_names(
    parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    common = (PROMPT, "--model", parts / tiny.MODEL, "--steps", 2, "--seed", 3, "--quiet")
    assert cli(*common, "--count", 6, "--out", "many.png") == 0
    names = capsys.readouterr().out.splitlines()
    assert names == [f"many-{seed}.png" for seed in range(3, 9)]
    assert [flowcore.read_settings(name)["seed"] for name in names] == [3, 4, 5, 6, 7, 8]
    assert len({pixels(name) for name in names}) == 6
    for expected in ("flowcore-3.png", "flowcore-3-2.png"):  # without --out nothing is replaced
        assert cli(*common) == 0
        assert capsys.readouterr().out.strip() == expected


def test_starting_from_a_picture(parts: Path, picture_file: Path, tmp_path: Path) -> None:
    results = []
    for strength in (0.2, 0.9):
        out = tmp_path / f"{strength}.png"
        options = ["--init", picture_file, "--strength", strength, "--out", out, "--steps", 3, "--quiet"]
        assert cli(PROMPT, "--model", parts / tiny.MODEL, *options) == 0
        with Image.open(out) as image:
            assert image.size == (40, 32)  # the picture's, down to whole latent cells
        results.append(pixels(out))
        assert flowcore.read_settings(out)["init"] == str(picture_file)
    assert results[0] != results[1]


def test_mask_keeps_the_latents_where_it_is_black(pipeline: Pipeline, picture_file: Path) -> None:
    settings = pipeline.sized(Settings(num_steps=3, width=32, height=32))
    with Image.open(picture_file) as image:
        clean = pipeline.encode_image(image, settings)
    mask = Image.new("L", (32, 32), 0)
    mask.paste(255, (16, 0, 32, 32))
    keep = pipeline.encode_mask(mask, settings)
    assert keep[0, 0].tolist() == [[0, 0, 1, 1]] * 4
    latents = pipeline.sample([PROMPT], [1], settings, clean=clean, mask=keep)
    assert torch.equal(latents[..., :2], clean[..., :2])
    assert not torch.isclose(latents[..., 2:], clean[..., 2:]).all()


def test_unknown_words_are_mentioned(parts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ("--model", parts / tiny.MODEL, "--out", tmp_path / "o.png", "--steps", 1, "--quiet")
    assert cli("a red elephant", *common) == 0
    assert capsys.readouterr().err == "note: the text encoder does not know elephant\n"
    assert cli("a red circle", *common) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--width", 100], "width must be a multiple of 8, got 100; nearest are 96 and 104"),
        (["--height", 3], "height must be a multiple of 8, got 3; nearest are 8 and 16"),
        (["--solver", "eulr"], "solver must be one of euler, .*got 'eulr'; nearest is euler"),
        (["--steps", 0], "num_steps must be at least 1, got 0"),
        (["--shift", 0], "shift must be a number above 0, got 0.0"),
        (["--cfg", "nan"], "cfg_scale must be finite, got nan"),
        (["--cfg-rescale", 2], "rescale amount must lie in \\[0, 1\\], got 2.0"),
        (["--seed", -1], "seed must lie in 0..18446744073709551615, got -1"),
        (["--seed", "x"], "argument --seed: invalid int value: 'x'; see python -m flowcore --help"),
        (["--sed", 1], "unrecognized arguments: --sed 1; see"),
        (["--count", 0], "--count must be at least 1, got 0"),
        (["--strength", 0.5], "strength must be 1 without an initial image, got 0.5; pass init_image"),
        (["--mask", "PICTURE"], "a mask must come with an initial image, got none; pass init_image"),
        (["--init", "no.png"], "image must be an existing file, got 'no.png'"),
        (["--init", "MODEL"], "image .*model.safetensors must decode, got .*save it again as PNG or JPEG"),
        (["--init", "PICTURE", "--strength", 1.5], "strength must lie above 0 and at most at 1, got 1.5"),
        (["--out", "out.jpg"], "output must end in .png, which keeps the settings, got 'out.jpg'"),
        (["--device", "tpu"], "device must be auto or one that is present .*cpu.*, got 'tpu'"),
        (["--dtype", "int8"], "dtype must be auto or one of float32, bfloat16, float16, got 'int8'"),
        (["--model", "no-such"], "existing file or folder or a bundled name .*, got 'no-such'"),
        (
            ["--model", "VAE"],
            "must be those of a .* model, got .* a VAE; give the file of the diffusion model",
        ),
        (["--vae", "MODEL"], "model.safetensors must hold a KL autoencoder .*got .*; pass a VAE file"),
        (
            ["--text-encoder", "VAE"],
            "vae.safetensors must hold a T5Gemma2 encoder, .* tensors of a VAE; pass",
        ),
        (["--model", "BROKEN"], "broken.safetensors must be a complete safetensors file"),
        (["--model", "NAMELESS"], "nameless.safetensors must name its vae .*, got none; pass one with vae="),
    ],
)
def test_what_users_do_wrong_is_one_line_and_code_2(
    options: list[object],
    message: str,
    parts: Path,
    picture_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = parts / tiny.MODEL
    broken, nameless = tmp_path / "broken.safetensors", tmp_path / "nameless.safetensors"
    broken.write_bytes(model.read_bytes()[:-100])
    save_file(load_file(model), nameless)
    places: dict[object, Path] = {
        "PICTURE": picture_file,
        "MODEL": model,
        "VAE": parts / tiny.VAE,
        "BROKEN": broken,
        "NAMELESS": nameless,
    }
    out = tmp_path / "earlier.png"
    out.write_bytes(b"earlier")
    given = [places.get(option, option) for option in options]
    code, line = failure(capsys, PROMPT, "--model", model, "--out", out, "--quiet", *given)
    assert code == 2
    assert re.search(message, line), line
    assert out.read_bytes() == b"earlier"
    assert not list(tmp_path.glob(".tmp-*"))


def test_a_result_that_cannot_be_written_is_code_1(
    parts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    out = tmp_path / "file" / "out.png"
    code, line = failure(capsys, PROMPT, "--model", parts / tiny.MODEL, "--out", out, "--steps", 1, "--quiet")
    assert code == 1
    assert f"{out} must be writable" in line


def test_debug_shows_the_traceback(parts: Path) -> None:
    with pytest.raises(flowcore.ConfigError, match="width must be a multiple"):
        main([PROMPT, "--model", str(parts / tiny.MODEL), "--width", "100", "--debug"])


def test_help_names_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli("--help") == 0
    text = capsys.readouterr().out
    for option in ("--model", "--out", "--seed", "--steps", "--cfg", "--width", "--height", "--solver"):
        assert option in text
    for option in (
        "--init",
        "--strength",
        "--mask",
        "--count",
        "--device",
        "--dtype",
        "--negative",
        "--tile",
    ):
        assert option in text


def test_a_picture_in_tiles_shows_their_bar_and_says_so(
    parts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.png"
    options = ["--steps", 1, "--width", 192, "--height", 64, "--device", "cpu"]
    assert cli(PROMPT, "--model", parts / tiny.MODEL, "--out", out, *options) == 0
    assert "tile" not in flowcore.read_settings(out)
    whole = pixels(out)
    assert "autoencoder" not in capsys.readouterr().err
    assert cli(PROMPT, "--model", parts / tiny.MODEL, "--out", out, *options, "--tile", 128) == 0
    assert flowcore.read_settings(out)["tile"] == 128
    assert pixels(out) != whole
    assert "autoencoder: 100%" in capsys.readouterr().err
    assert cli(PROMPT, "--model", parts / tiny.MODEL, "--out", out, *options, "--tile", 100) == 2
    assert "the side of a tile must be 0 or a multiple of 64" in capsys.readouterr().err


def test_without_a_prompt_the_error_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    code, line = failure(capsys)
    assert code == 2
    assert "required: PROMPT" in line


def test_inspect_says_what_files_are(parts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, kind in ((tiny.MODEL, "model"), (tiny.VAE, "vae"), (tiny.TEXT, "text encoder")):
        assert cli("inspect", parts / name) == 0
        found = json.loads(capsys.readouterr().out)
        assert (found["kind"], found["file"]) == (kind, str(parts / name))
    assert cli("inspect", parts / tiny.MODEL) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["architecture"], found["layout"]) == ("xut", "bare")
    assert found["config"]["dim"] == 32
    assert found["metadata"]["modelspec.resolution"] == "32x24"
    code, line = failure(capsys, "inspect", parts / "none.safetensors")
    assert code == 2
    assert "none.safetensors" in line


def test_converted_model_makes_the_same_picture(
    parts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "model.safetensors"
    assert cli("convert", parts / tiny.MODEL, target, "--layout", "diffusion_model") == 0
    assert "layout diffusion_model" in capsys.readouterr().out
    assert all(key.startswith("diffusion_model.") for key in load_file(target))
    for part in (tiny.VAE, tiny.TEXT):
        (tmp_path / part).write_bytes((parts / part).read_bytes())
    for index, model in enumerate((parts / tiny.MODEL, target)):
        options = ("--steps", 2, "--quiet", "--out", tmp_path / f"{index}.png")
        assert cli(PROMPT, "--model", model, *options) == 0
    assert pixels(tmp_path / "0.png") == pixels(tmp_path / "1.png")
    capsys.readouterr()
    code, line = failure(capsys, "convert", parts / tiny.MODEL, target, "--layout", "gguf")
    assert code == 2
    assert "layout must be one of" in line
    assert failure(capsys, "convert", target, target)[0] == 2


def test_without_torch_one_line_says_so() -> None:
    code = (
        "import sys; sys.modules['torch'] = None; from flowcore.__main__ import main; print(main(['a bee']))"
    )
    done = run_python("-c", code)
    assert done.stdout.strip() == "2"
    assert done.stderr == (
        "error: package torch must be installed, found none; run: python -m pip install torch\n"
    )
