"""Masks on latents and pixels, what is kept of prompts, and states joined and split."""

from dataclasses import replace

import pytest
import torch

from flowcore.conditioning import Conditioning
from flowcore.errors import ConfigError
from flowcore.exo.masks import late_level, on_latents, on_pixels, preserving, stretch
from flowcore.exo.prefixes import Recent, prompt_keys
from flowcore.models.exo import join_prefixes
from tests.exo_recomputed import random_exo
from tests.support import assert_close

GRID = torch.tensor([[[0.1, 0.9], [0.4, 0.0]]])


def test_contrast() -> None:
    assert_close(
        stretch(torch.tensor([0.0, 0.2, 0.4, 0.6, 1.0])), torch.tensor([0, 0, 0.5, 1, 1]), limit=1e-6
    )


def test_each_cell_covers_two_by_two_latents_and_odd_grids_are_cut() -> None:
    found = on_latents(GRID, (3, 4))
    assert found.shape == (1, 1, 3, 4)
    rows = [[0.1, 0.1, 0.9, 0.9]] * 2 + [[0.4, 0.4, 0.0, 0.0]]
    assert torch.equal(found[0, 0], torch.tensor(rows))


@pytest.mark.parametrize(("downscale", "side"), [(16, 32), (8, 16)])
def test_cells_on_pixels(downscale: int, side: int) -> None:
    squares = on_pixels(GRID, (3, 4), downscale, "nearest")
    assert squares.shape == (1, 3 * downscale, 4 * downscale)
    assert float(squares[0, side - 1, side]) == pytest.approx(0.9)
    assert float(squares[0, side, side - 1]) == pytest.approx(0.4)
    smooth = on_pixels(GRID, (3, 4), downscale)
    assert float(smooth[0, 0, 0]) == pytest.approx(0.1)
    assert float(smooth[0, 0, side]) == pytest.approx(0.5 + 0.8 * 0.5 / side, abs=1e-5)
    with pytest.raises(ConfigError, match="must be one of bilinear, nearest, got 'cubic'"):
        on_pixels(GRID, (3, 4), downscale, "cubic")


def test_preserving_leads_to_the_clean_latents_where_the_mask_is_0() -> None:
    clean, x = torch.randn(1, 3, 2, 2), torch.randn(1, 3, 2, 2)
    mask = torch.tensor([[[[0.0, 1.0], [0.5, 0.0]]]])
    plain, level = torch.randn(1, 3, 2, 2), torch.tensor([0.4])
    found = preserving(lambda _x, _sigma: plain, lambda: mask, clean, 1.0, 0.4)(x, level)
    denoised = x - 0.4 * found
    assert_close(denoised[..., 0, 0], clean[..., 0, 0], limit=1e-5)
    assert_close(found[..., 0, 1], plain[..., 0, 1], limit=1e-5)
    middle = (clean + x - 0.4 * plain)[..., 1, 0] / 2
    assert_close(denoised[..., 1, 0], middle, limit=1e-5)
    early = preserving(lambda _x, _sigma: plain, lambda: mask, clean, 1.0, 0.4)(x, torch.tensor([0.5]))
    assert_close(early, plain, limit=1e-5)


@pytest.mark.parametrize(
    ("levels", "expected"),
    [([1.0, 0.6, 0.29, 0.2], 0.29), ([1.0, 0.8, 0.4], 0.4), ([0.3], 0.3)],
)
def test_masks_count_late_and_at_least_in_the_last_step(levels: list[float], expected: float) -> None:
    assert late_level(levels) == pytest.approx(expected)


def test_the_least_recently_used_leaves_first() -> None:
    asked: list[list[int]] = []

    def read(rows: list[int]) -> list[object]:
        asked.append(rows)
        return [f"state {row}" for row in rows]

    cache = Recent(kept=2)
    assert cache.get(["a", "b", "a"], read) == ["state 0", "state 1", "state 0"]
    assert cache.get(["a"], read) == ["state 0"]
    assert cache.get(["c"], read) == ["state 0"]  # b leaves
    assert cache.get(["a", "c"], read) == ["state 0", "state 0"]
    assert cache.get(["b", "x", "y"], read) == ["state 0", "state 1", "state 2"]
    assert asked == [[0, 1], [0], [0, 1, 2]]
    assert len(cache) == 2
    cache.clear()
    assert len(cache) == 0


def test_prompts_are_told_apart_by_tokens_and_pictures() -> None:
    ids = torch.tensor([[1, 2, 0], [1, 2, 3], [1, 2, 0]])[..., None]
    mask = torch.tensor([[1, 1, 0], [1, 1, 1], [1, 1, 0]]).bool()
    first, second, third = prompt_keys(Conditioning(context=ids, context_mask=mask))
    assert first == third != second
    pixels = torch.zeros(3, 4, 2)
    pixels[2, 3, 1] = 1e-3
    extras = {"pixels": pixels, "grids": torch.ones(3, 3).long()}
    with_pictures = prompt_keys(Conditioning(context=ids, context_mask=mask, extras=extras))
    assert len(set(with_pictures)) == 3
    assert first not in with_pictures


def test_states_split_and_joined_are_the_same_states() -> None:
    model = random_exo()
    ids = torch.randint(97, 122, (2, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3]).bool()
    z, t = torch.randn(2, 16, 4, 4), torch.tensor([0.3, 0.8])
    with torch.no_grad():
        whole = model.encode(ids, mask, size=(4, 4))
        parts = whole.split()
        assert [part.past.length for part in parts] == [7, 4]
        assert parts[1].past.layers[0].keys.shape[2] == 4
        joined = join_prefixes(parts[::-1], room=64)
        expected = model.step(z, t, whole)
        found = model.step(z.flip(0), t.flip(0), joined)
        assert_close(found.velocity.flip(0), expected.velocity, limit=1e-5)
        assert_close(joined.rows(1, 2).keep, mask[:1], limit=0)
        tight = join_prefixes(parts)
        assert_close(model.step(z, t, tight).velocity, expected.velocity, limit=1e-5)


def test_a_batch_with_and_without_pictures_joins() -> None:
    model = random_exo()
    with torch.no_grad():
        state = model.encode(torch.tensor([[97, 98]]), size=(4, 4))
    joined = join_prefixes([state, replace(state, features=torch.ones(1, 8, 4, 4))])
    assert joined.features is not None
    assert joined.features.flatten(1).sum(dim=1).tolist() == [0.0, 128.0]
