"""Prompts about one picture: with the picture first, what they share is read once and changes nothing."""

import pytest
import torch
from torch import Tensor

from flowcore.models.exo import Exo
from flowcore.models.exo import model as exo_model
from flowcore.models.exo.reading import shared_start
from flowcore.text.qwen3_vl import ByteTokenizer, PromptReader
from tests.exo_recomputed import random_exo
from tests.support import assert_close

PROMPTS = ["make the circle green", "", "remove the small red square"]


@pytest.fixture(scope="module")
def model() -> Exo:
    return random_exo(image_first=True)


def pictures(count: int, *, alike: bool) -> Tensor:
    drawn = torch.rand(count, 3, 64, 96, generator=torch.Generator().manual_seed(3)) * 2 - 1
    return drawn[:1].expand(count, -1, -1, -1).clone() if alike else drawn


def told(*, image_first: bool = True, alike: bool = True, prompts: list[str] = PROMPTS) -> dict[str, Tensor]:
    reader = PromptReader(ByteTokenizer(), "bytes", image_first=image_first)
    found = reader.read(prompts, pictures(len(prompts), alike=alike))
    assert found.context is not None
    assert found.context_mask is not None
    return {"token_ids": found.context[..., 0], "token_mask": found.context_mask, **found.extras}


def start_of(asked: dict[str, Tensor], image: int) -> int:
    ids, mask = asked["token_ids"], asked["token_mask"]
    return shared_start(ids, mask, (ids == image) & mask, asked["pixels"])


def test_what_prompts_share_is_read_once_and_changes_nothing(
    model: Exo, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, seen = told(), []

    def look(trunk: object, pixels: Tensor, grids: Tensor) -> object:
        seen.append(len(pixels))
        return real(trunk, pixels, grids)

    real = exo_model.look
    monkeypatch.setattr(exo_model, "look", look)
    z, t = torch.randn(3, 16, 4, 6, generator=torch.Generator().manual_seed(1)), torch.tensor([0.2, 0.5, 0.9])
    with torch.no_grad():
        together = model.step(z, t, model.encode(**asked, size=(4, 6)), iterations=2)
        assert seen == [1]
        for row in range(3):
            length = int(asked["token_mask"][row].sum())
            one = {name: part[row : row + 1] for name, part in asked.items()}
            one |= {name: one[name][:, :length] for name in ("token_ids", "token_mask")}
            alone = model.step(
                z[row : row + 1], t[row : row + 1], model.encode(**one, size=(4, 6)), iterations=2
            )
            assert_close(together.velocity[row : row + 1], alone.velocity, limit=1e-5, what="velocity")
            assert_close(together.edits[row : row + 1], alone.edits, limit=1e-5, what="edits")


def test_answers_follow_what_was_shared(model: Exo) -> None:
    asked = told()
    ids, mask, end = asked["token_ids"], asked["token_mask"], 257
    pixels, grids = asked["pixels"], asked["grids"]
    whole = model.answer(ids, mask, end=end, most=5, pixels=pixels, grids=grids)
    for row, said in enumerate(whole):
        length = int(mask[row].sum())
        some = slice(row, row + 1)
        alone = model.answer(
            ids[some, :length], mask[some, :length], end=end, most=5, pixels=pixels[some], grids=grids[some]
        )
        assert alone == [said]


def test_shared_prompts_take_gradients(model: Exo) -> None:
    model.encode(**told(), size=(4, 6)).reads[0].keys.square().mean().backward()
    assert model.trunk.get_parameter("visual.patch_embed.proj.weight").grad.abs().max() > 0
    model.zero_grad(set_to_none=True)


def test_only_a_picture_that_all_begin_with_is_shared(model: Exo) -> None:
    image = model.config.trunk["image_token_id"]
    start = start_of(told(), image)
    ids = told()["token_ids"]
    assert bool((ids[:, start - 2] == ids[0, start - 2]).all())
    assert not bool((ids[:, start] == ids[0, start]).all())
    assert start_of(told(image_first=False), image) == 0
    assert start_of(told(alike=False), image) == 0
    assert start_of(told(prompts=["red"]), image) == 0
    # prompts that are alike part before their end: there is always something left to read
    same = told(prompts=["red", "red"])
    assert start_of(same, image) == same["token_ids"].shape[1] - 1
