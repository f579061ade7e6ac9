"""Captions by a tiny random Qwen3-VL: what is written, what is left alone, what is said of wrong input."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3VLConfig, Qwen3VLForConditionalGeneration

from flowcore.models.exo.trunk_config import TRUNKS
from flowcore.text.qwen3_vl import IMAGE, SPECIAL
from tests.unit.training.workspace import error_line, leftovers, write_images
from training import captioner as module
from training.caption import main
from training.captioner import Captioner

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for part in m['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{{ '<|im_start|>assistant\n' }}"
)
BOTANICAL = Path(__file__).parents[3] / "training" / "configs" / "botanical.txt"


def write_model(folder: Path) -> Path:
    """A tiny Qwen3-VL whose tokens are bytes, with a tokenizer of the published class."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate(letters)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([*SPECIAL])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, chat_template=TEMPLATE, pad_token=SPECIAL[-1], eos_token=SPECIAL[1]
    ).save_pretrained(folder)
    ids = dict(zip(SPECIAL, range(256, 262), strict=True))
    settings = TRUNKS["tiny"]
    config = Qwen3VLConfig(
        text_config={**settings["text_config"], "eos_token_id": ids["<|im_end|>"], "pad_token_id": 261},
        vision_config=settings["vision_config"],
        image_token_id=ids[IMAGE],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    network = Qwen3VLForConditionalGeneration(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(std=0.3, generator=generator)
    network.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Answers that stand in for the network's, in turn; the first picture gets the last of them."""
    given: list[str] = []

    class Fake:
        def __init__(self, source: str, **options: object) -> None:
            assert source == "MODEL"
            del options

        def caption(self, picture: torch.Tensor, request: str, system: str, *, max_tokens: int) -> str:
            assert picture.shape == (3, 32, 32)
            assert (request, max_tokens) == ("Describe this picture.", 256)
            return given.pop() if given else system

    monkeypatch.setattr(module, "Captioner", Fake)
    return given


def run(folder: Path, *arguments: str, model: str = "MODEL") -> int:
    return main([str(folder), "--model", model, *arguments])


def captions(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text("utf-8") for path in sorted(folder.rglob("*.txt"))}


def images(folder: Path, count: int = 3) -> Path:
    write_images(folder, count)
    for path in folder.glob("*.txt"):
        path.unlink()
    return folder


def test_a_model_is_asked_with_picture_instruction_and_request(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    captioner = Captioner(str(model), device="cpu")
    generate, asked = captioner.network.generate, []

    def recorded(**inputs: object) -> torch.Tensor:
        asked.append(inputs)
        result: torch.Tensor = generate(**inputs)
        return result

    monkeypatch.setattr(captioner.network, "generate", recorded)
    noise = [torch.rand(3, 48, 64, generator=torch.Generator().manual_seed(n)) * 2 - 1 for n in (0, 1)]
    said = [captioner.caption(picture, "What?", "Be short.", max_tokens=4) for picture in (*noise, noise[0])]
    assert said[0] == said[2] != ""
    assert all(len(text.encode()) <= 4 * 3 for text in said)
    first = asked[0]
    assert first.pop("max_new_tokens") == 4
    assert first.pop("do_sample") is False
    assert first["image_grid_thw"].tolist() == [[1, 28, 38]]  # 14 x 19 = 266 visual tokens
    assert int((first["input_ids"] == captioner.network.config.image_token_id).sum()) == 266
    text = captioner.tokenizer.network.decode(first["input_ids"][0])
    assert text.startswith("<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\n<|vision_start|>")
    assert text.endswith("<|vision_end|>What?<|im_end|>\n<|im_start|>assistant\n")
    with torch.inference_mode():
        logits = [captioner.network(**{k: v for k, v in i.items() if k in first}).logits for i in asked]
    assert torch.equal(logits[0], logits[2])
    assert (logits[0][0, -1] - logits[1][0, -1]).abs().max() > 1e-4


def test_a_chat_without_instruction_has_no_system_turn(model: Path) -> None:
    assert (
        Captioner(str(model), device="cpu").chat("What?", "").startswith("<|im_start|>user\n<|vision_start|>")
    )


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (" a\n rose ", "a rose"),
        ("<think>red?</think>\n\na rose", "a rose"),
        ("<think>red", ""),
        ("x</think> a", "a"),
    ],
)
def test_thoughts_are_left_out(
    answer: str, expected: str, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    captioner = Captioner(str(model), device="cpu")
    monkeypatch.setattr(captioner.tokenizer.network, "decode", lambda *_, **__: answer)
    assert captioner.caption(torch.zeros(3, 32, 32), "?", max_tokens=1) == expected


def test_a_folder_gets_captions_from_a_real_model(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = images(tmp_path / "images", 2)
    arguments = ["--system", str(BOTANICAL), "--max-tokens", "4", "--device", "cpu"]
    assert run(folder, *arguments, model=str(model)) == 0
    assert capsys.readouterr().out == f"2 captions written in {folder}\n"
    assert all(text.strip() and text.endswith("\n") for text in captions(folder).values())
    assert len(captions(folder)) == 2


def test_captions_that_are_there_stay_unless_they_are_to_be_replaced(
    tmp_path: Path, answers: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = images(tmp_path)
    (folder / "deep").mkdir()
    (folder / "02.png").rename(folder / "deep" / "02.png")
    (folder / "01.txt").write_text("mine")
    shutil.copy(folder / "00.png", folder / "01.source.png")
    answers += ["two", "zero"]
    assert run(folder) == 0
    assert captions(folder) == {"00.txt": "zero\n", "01.txt": "mine", "02.txt": "two\n"}
    assert run(folder) == 0
    assert "0 captions written, for every image has one" in capsys.readouterr().out
    answers += ["c", "b", "a"]
    assert run(folder, "--overwrite") == 0
    assert captions(folder) == {"00.txt": "a\n", "01.txt": "b\n", "02.txt": "c\n"}
    answers += ["r", "q", "p"]
    assert run(folder, "--caption-extension", ".cap") == 0
    assert (folder / "00.cap").read_text() == "p\n"


def test_a_stopped_or_killed_run_goes_on(
    tmp_path: Path, answers: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = images(tmp_path)
    (folder / ".tmp-12-00.txt").write_text("half")
    (folder / ".tmp-mine.txt").write_text("mine")
    from training import caption, files

    write = files.write_atomic

    def stopping(path: Path, text: str) -> None:
        write(path, text)
        stop.requested = True

    stop = caption.StopFlag()
    monkeypatch.setattr(caption, "StopFlag", lambda: stop)
    with monkeypatch.context() as patch:
        patch.setattr(files, "write_atomic", stopping)
        answers += ["zero"]
        assert run(folder) == 3
    assert "stopped after 1 captions; the same command goes on" in capsys.readouterr().err
    assert leftovers(folder) == [".tmp-mine.txt"]
    stop.requested = False
    answers += ["two", "one"]
    assert run(folder) == 0
    (folder / ".tmp-mine.txt").unlink()
    assert captions(folder) == {"00.txt": "zero\n", "01.txt": "one\n", "02.txt": "two\n"}


def test_a_picture_without_caption_or_pixels_is_named(
    tmp_path: Path, answers: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = images(tmp_path)
    (folder / "01.png").write_bytes(b"nothing")
    answers += ["x", "zero"]
    assert run(folder) == 2
    assert "01.png: image must decode" in (line := error_line(capsys))
    assert line.endswith("remove it or add --skip-broken")
    answers.clear()
    assert run(folder, "--skip-broken") == 0
    err = capsys.readouterr().err
    assert "01.png: image must decode" in err
    assert "02.png: the model says nothing in 256 tokens; left out" in err
    assert captions(folder) == {"00.txt": "zero\n"}


def test_the_botanical_instruction_is_read() -> None:
    text = BOTANICAL.read_text("utf-8")
    assert "botanical" in text
    assert IMAGE not in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-tokens", "0"], "--max-tokens must be at least 1, got 0"),
        (["--caption-extension", "txt"], "--caption-extension must be a dot and a name, got 'txt'"),
        (["--system", "none.txt"], "--system must be a readable UTF-8 text file, got none.txt"),
        (["--model", "none"], "--model must be the folder of a Qwen3-VL or hub:OWNER/NAME, got none"),
        (["--model", "hub:none"], "a hub address must be hub:OWNER/NAME"),
        (["--nothing"], "unrecognized arguments: --nothing"),
    ],
)
def test_wrong_options_are_one_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = images(tmp_path, 1)
    try:
        code = run(folder, *arguments)
    except SystemExit as err:
        code = int(str(err.code))
    assert code == 2
    assert message in error_line(capsys)
    assert not captions(folder)


def test_folders_that_cannot_be_used_are_named(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path / "none") == 2
    assert "none must be a folder of images, got no folder" in error_line(capsys)
    assert run(tmp_path) == 2
    assert "must hold images, got none" in error_line(capsys)
    folder, other = images(tmp_path / "images", 1), tmp_path / "other"
    shutil.copytree(model, other)
    (other / "tokenizer.json").unlink()
    assert run(folder, model=str(other)) == 2
    assert "must come with its processor, got no tokenizer.json" in error_line(capsys)
    settings = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**settings, "model_type": "llama"}))
    assert run(folder, model=str(other)) == 2
    assert "must be a Qwen3-VL, got model_type llama" in error_line(capsys)
