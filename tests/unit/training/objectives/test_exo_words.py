"""What exo's own trunk learns to say, and to see in words."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from flowcore.models.exo.model import Reading
from flowcore.models.exo.trunk import look
from flowcore.text.qwen3_vl import last_line
from tests.unit.training.objectives.test_exo import BATCH, SEEN, rewriter, step_of
from training.objectives.language import PLACE_SHARE, place_loss


def test_language_is_learned_from_captions_and_from_answers_without_a_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = rewriter(tmp_path, {"exo": {"task": "language"}, "cond_dropout": 0.0})
    heard: list[str] = []
    read = made.exo.read

    def listen(ids: torch.Tensor, mask: torch.Tensor, **options: Any) -> Reading:
        heard.extend(
            made.chat.tokenizer.text(row[real].tolist()) for row, real in zip(ids, mask, strict=True)
        )
        return read(ids, mask, **options)

    monkeypatch.setattr(made.exo, "read", listen)
    for is_edit in (False, True):
        heard.clear()
        draw = made.draw(step_of(made, is_edit=is_edit), BATCH)
        made.loss(draw.step, BATCH)
        for text, caption, number in zip(heard, draw.captions, draw.numbers, strict=True):
            said = f"{SEEN}\nshows {made.data.samples[number].path.stem}" if is_edit else ""
            assert text.split() == f"user {caption} assistant {said}".split()


def test_language_tells_the_words_before_from_a_third_of_the_tokens_in_turns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = rewriter(tmp_path, {"exo": {"task": "language"}})
    assert made.heads is not None
    places: list[set[int]] = []

    def listen(states: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:  # noqa: ARG001
        places.append(set(mask.any(dim=0).nonzero()[:, 0].tolist()))
        return states.new_zeros(())

    monkeypatch.setattr(made.heads, "spoken_loss", listen)
    for step in range(3):
        places.clear()
        made.loss(step, BATCH)
        assert len(places) == len(made.exo.config.context_layers)
        for found in places:
            assert found == set(range(step, max(found) + 1, 3))


def test_rewriting_is_learned_from_the_words_of_the_answer_alone(tmp_path: Path) -> None:
    """The cross-entropy of each word after the picture, what is asked and the words before, written out."""
    made = rewriter(tmp_path, {"exo": {"task": "rewrite"}})
    draw = made.draw(0, BATCH)
    table = made.exo.get_parameter("trunk.language_model.embed_tokens.weight")
    losses = []
    with torch.no_grad():
        for number in draw.numbers:
            sample = made.data.samples[number]
            asked = made.chat.read([sample.caption], made._sources([number]))
            said = torch.tensor([made.chat.tokenizer.ids(f"{SEEN}\nshows {sample.path.stem}<|im_end|>")])
            ids = torch.cat([asked.context[..., 0], said], dim=1)
            mask = torch.ones_like(ids, dtype=torch.bool)
            states = made.exo.read(ids, mask, **asked.extras).passed.hidden[:, -1 - said.shape[1] : -1]
            losses.append(functional.cross_entropy((states @ table.T)[0], said[0], reduction="none"))
        assert float(made.loss(0, BATCH)) == pytest.approx(float(torch.cat(losses).mean()), rel=1e-5)
    assert all(made._is_edit(made.draw(step, BATCH)) for step in range(8))


def test_visual_tokens_learn_words_and_places_beside_the_latents(tmp_path: Path) -> None:
    """The words that some visual token likes best, rare ones for more, and the row and column of each."""
    plain, told = (
        rewriter(tmp_path, {"exo": {"task": "projector", "words": weight}}) for weight in (0.0, 0.5)
    )
    samples = told.data.samples
    said = [set(told.chat.tokenizer.ids(last_line(one.answer or one.caption))) for one in samples]
    draw = told.draw(0, BATCH)
    trunk, table = told.exo.trunk, told.exo.get_parameter("trunk.language_model.embed_tokens.weight")
    assert trunk is not None
    with torch.no_grad():
        pictures = told.chat.read([""] * 4, told._pictures(draw.numbers))
        picture = look(trunk, pictures.extras["pixels"], pictures.extras["grids"])
        tokens = trunk.get_submodule("language_model.norm")(picture.tokens)
        total = worth = 0.0
        for number, row in zip(draw.numbers, (tokens @ table.T).exp().sum(dim=1), strict=True):
            for word in said[number]:
                rare = math.log((len(said) + 1) / (1 + sum(word in one for one in said)))
                total, worth = total - rare * float((row[word] / row.sum()).log()), worth + rare
        found = float(told.loss(0, BATCH)) - float(plain.loss(0, BATCH))
        places = place_loss(tokens, (picture.rows, picture.columns), told.recipe.seed)
    assert found == pytest.approx(0.5 * (total / worth + PLACE_SHARE * float(places)), rel=1e-4)
