"""Steps of Exo: the cache changes nothing, nor does padding, a batch, a size or a number of iterations."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from flowcore.conditioning import Conditioning, cat
from flowcore.errors import ConfigError, ShapeError
from flowcore.models.exo import PRESETS, Exo, StepResult, velocity
from flowcore.ops import Runtime, run_checkpointed
from flowcore.text.qwen3_vl import ByteTokenizer, encode_prompts
from tests.exo_recomputed import Prompt, random_exo, recomputed_step
from tests.support import assert_close

LIMIT = 1e-5
PROMPTS = ["a red circle", "a green square left of a blue star"]


@pytest.fixture(scope="module")
def model() -> Exo:
    return random_exo()


def prompt_of(prompts: list[str], *, has_picture: bool = True) -> Prompt:
    """Prompts of different lengths, with pictures of 2 x 3 visual tokens."""
    images = torch.rand(len(prompts), 3, 64, 96, generator=torch.Generator().manual_seed(3)) * 2 - 1
    found = encode_prompts(ByteTokenizer(), prompts, images if has_picture else None)
    assert found.context is not None
    return Prompt(token_ids=found.context[..., 0], token_mask=found.context_mask, **found.extras)


def encode(model: Exo, prompt: Prompt, size: tuple[int, int]) -> object:
    return model.encode(
        prompt.token_ids, prompt.token_mask, size=size, pixels=prompt.pixels, grids=prompt.grids
    )


def latents(batch: int, size: tuple[int, int], channels: int = 16) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, channels, *size, generator=generator), torch.rand(batch, generator=generator)


def compare(found: StepResult, expected: StepResult, limit: float = LIMIT) -> None:
    """All that a step yields."""
    assert_close(found.velocity, expected.velocity, limit=limit, what="velocity")
    assert_close(found.edits, expected.edits, limit=limit, what="edits")
    for one, other in zip(found.iterations, expected.iterations, strict=True):
        assert_close(one.mask, other.mask, limit=limit, what="mask")
        assert torch.equal(one.indices, other.indices)


@pytest.mark.parametrize("has_picture", [True, False])
@pytest.mark.parametrize("size", [(8, 8), (5, 9)])
@pytest.mark.parametrize(
    "changes",
    [{}, {"num_queries": 0, "lora_rank": 4}, {"memory_compares": True}],
    ids=["tiny", "literal", "comparing"],
)
def test_cached_step_equals_full_recomputation(
    changes: dict[str, int], size: tuple[int, int], has_picture: bool
) -> None:
    model = random_exo(**changes)
    prompt = prompt_of(PROMPTS, has_picture=has_picture)
    z, t = latents(2, size)
    with torch.no_grad():
        prefix = encode(model, prompt, size)
        for time in (t, t / 2):  # a second step must find nothing of the first
            compare(model.step(z, time, prefix), recomputed_step(model, z, time, prompt))


def test_cached_step_equals_full_recomputation_in_float64(model: Exo) -> None:
    model, prompt = random_exo().double(), prompt_of(PROMPTS)
    z, t = latents(2, (6, 4))
    prompt = Prompt(**{**vars(prompt), "pixels": prompt.pixels.double()})
    with torch.no_grad():
        prefix = encode(model, prompt, (6, 4))
        compare(model.step(z.double(), t, prefix), recomputed_step(model, z.double(), t, prompt), 1e-10)


def test_a_step_has_the_iterations_that_can_be_had_without_a_velocity(model: Exo) -> None:
    (z, t), prompt = latents(2, (4, 6)), prompt_of(PROMPTS)
    with torch.no_grad():
        prefix = encode(model, prompt, (4, 6))
        step, found = model.step(z, t, prefix, iterations=3), list(model.refine(z, t, prefix, iterations=3))
    assert len(found) == len(step.iterations) == 3
    assert all(torch.equal(a.edit.mask, b.mask) for a, b in zip(found, step.iterations, strict=True))
    assert torch.equal(found[-1].edits, step.edits)
    with pytest.raises(ConfigError, match=r"iterations must lie in 1\.\.8, got 9"):
        next(model.refine(z, t, prefix, iterations=9))


def test_an_unchanged_picture_leaves_noise_alone() -> None:
    memory, (picture, t) = Exo(replace(PRESETS["tiny"], memory_compares=True)).memory, latents(2, (4, 6))
    with torch.no_grad():
        noise = torch.randn(picture.shape, generator=torch.Generator().manual_seed(2))
        level = t[:, None, None, None]
        found = memory.base((1 - level) * picture + level * noise, t, None, picture)
        assert_close(found, memory.base(level * noise, t, None, None), limit=1e-5)


def test_a_comparing_memory_tells_how_far_cells_are_from_the_picture() -> None:
    memory = Exo(replace(PRESETS["tiny"], memory_compares=True)).memory
    assert memory.distance is not None
    picture, _ = latents(2, (4, 6))
    picture[1] = 0  # what a sample without a picture has
    changed = picture.clone()
    changed[:, :, :2, :2] += 2.0  # the first cell
    noise = torch.randn(picture.shape, generator=torch.Generator().manual_seed(2))
    told = {}
    for sigma in (0.05, 0.4):
        noised, level = (1 - sigma) * changed + sigma * noise, torch.full((2,), sigma)
        memory.distance.weight.data.fill_(1.0)
        with_it = memory.base(noised, level, None, picture)
        memory.distance.weight.data.zero_()
        told[sigma] = (with_it - memory.base(noised, level, None, picture))[..., 0]
    for steps in told.values():
        assert steps[0, 0] > 2 * steps[0, 1:].max()
        assert not steps[1].any()
    # noise alone is no distance, whatever its level
    assert (told[0.05][0, 1:].mean() - told[0.4][0, 1:].mean()).abs() < 1.5


def test_a_step_with_gradients_equals_one_without(model: Exo) -> None:
    prompt, (z, t) = prompt_of(PROMPTS), latents(2, (4, 6))
    compare(model.step(z, t, encode(model, prompt, (4, 6))), recomputed_step(model, z, t, prompt))


@pytest.mark.parametrize("iterations", range(1, 9))
def test_iterations(model: Exo, iterations: int) -> None:
    prompt, (z, t) = prompt_of(PROMPTS), latents(2, (4, 4))
    with torch.no_grad():
        found = model.step(z, t, encode(model, prompt, (4, 4)), iterations=iterations)
        compare(found, recomputed_step(model, z, t, prompt, iterations=iterations))
    assert len(found.iterations) == iterations


@pytest.mark.parametrize("iterations", [0, 9])
def test_iterations_out_of_range(model: Exo, iterations: int) -> None:
    prompt, (z, t) = prompt_of(PROMPTS), latents(2, (4, 4))
    prefix = encode(model, prompt, (4, 4))
    with pytest.raises(ConfigError, match=rf"iterations must lie in 1\.\.8, got {iterations}"):
        model.step(z, t, prefix, iterations=iterations)


def test_padded_batch_equals_singles(model: Exo) -> None:
    prompt, (z, t) = prompt_of(PROMPTS), latents(2, (4, 6))
    with torch.no_grad():
        both = model.step(z, t, encode(model, prompt, (4, 6)))
        for i in range(2):
            length = int(prompt.token_mask[i].sum())
            one = Prompt(
                token_ids=prompt.token_ids[i : i + 1, :length],
                pixels=prompt.pixels[i : i + 1],
                grids=prompt.grids[i : i + 1],
            )
            single = model.step(z[i : i + 1], t[i : i + 1], encode(model, one, (4, 6)))
            assert_close(both.velocity[i : i + 1], single.velocity, limit=LIMIT)
            assert_close(both.mask[i : i + 1], single.mask, limit=LIMIT)


def test_prompts_with_and_without_picture_in_one_batch(model: Exo) -> None:
    with_picture, text = prompt_of(PROMPTS[:1]), prompt_of(PROMPTS[1:], has_picture=False)
    items = [
        Conditioning(context=p.token_ids[..., None], context_mask=p.token_mask) for p in (with_picture, text)
    ]
    joined = cat(items)
    z, t = latents(2, (4, 4))
    with torch.no_grad():
        prefix = model.encode(
            joined.context[..., 0],
            joined.context_mask,
            size=(4, 4),
            pixels=with_picture.pixels,
            grids=with_picture.grids,
        )
        both = model.step(z, t, prefix)
        for i, prompt in enumerate((with_picture, text)):
            single = model.step(z[i : i + 1], t[i : i + 1], encode(model, prompt, (4, 4)))
            assert_close(both.velocity[i : i + 1], single.velocity, limit=LIMIT)


def test_prompt_is_computed_once(model: Exo) -> None:
    calls = []

    def count(kind: str, index: int, block: object, x: Tensor) -> object:
        calls.append((kind, index, x.shape[1]))
        return block(x)

    prompt, (z, t) = prompt_of(PROMPTS), latents(2, (4, 4))
    runtime = Runtime(run_block=count)
    with torch.no_grad():
        prefix = model.encode(
            prompt.token_ids,
            prompt.token_mask,
            size=(4, 4),
            pixels=prompt.pixels,
            grids=prompt.grids,
            runtime=runtime,
        )
        for _ in range(3):
            model.step(z, t, prefix, runtime=runtime)
    length, suffix = prompt.token_ids.shape[1], model.config.suffix_length
    assert [call for call in calls if call[0] == "trunk" and call[2] == length] == [
        ("trunk", layer, length) for layer in range(4)
    ]
    assert len([call for call in calls if call[2] == suffix]) == 3 * 4 * 4
    assert len([call for call in calls if call[0] == "diffusion"]) == 3 * 2


def test_prefix_does_not_depend_on_steps(model: Exo) -> None:
    prompt, (z, t) = prompt_of(PROMPTS), latents(2, (4, 4))
    with torch.no_grad():
        prefix = encode(model, prompt, (4, 4))
        length = prefix.past.length
        before = [part[:, :, :length].clone() for layer in prefix.past.layers for part in layer]
        first = model.step(z, t, prefix)
        model.step(-z, t / 3, prefix, iterations=8)
        after = [part[:, :, :length] for layer in prefix.past.layers for part in layer]
        again = model.step(z, t, prefix)
    assert all(map(torch.equal, before, after))
    assert torch.equal(first.velocity, again.velocity)


def test_checkpointing_keeps_the_gradients() -> None:
    model, prompt, (z, t) = random_exo(lora_rank=2), prompt_of(PROMPTS), latents(2, (4, 4))
    gradients = []
    for runtime in (Runtime(), Runtime(run_block=run_checkpointed)):
        model.zero_grad()
        result = model(
            z,
            t,
            prompt.token_ids,
            prompt.token_mask,
            pixels=prompt.pixels,
            grids=prompt.grids,
            iterations=2,
            runtime=runtime,
        )
        result.square().sum().backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    plain, checkpointed = gradients
    assert plain.keys() == checkpointed.keys()
    assert {name.split(".")[0] for name in plain} >= {"trunk", "lora", "tokens", "adapters", "edit_head"}
    for name, gradient in plain.items():
        assert_close(checkpointed[name], gradient, limit=LIMIT, what=name)


def test_estimates_and_masks(model: Exo) -> None:
    prompt, (z, t) = prompt_of(PROMPTS), latents(2, (5, 7))
    with torch.no_grad():
        found = model.step(z, t, encode(model, prompt, (5, 7)), every_iteration=True)
        three = model.step(z, t, encode(model, prompt, (5, 7)), iterations=3)
    w = t[:, None, None, None]
    assert_close((1 - w) * found.clean + w * found.noise, z, limit=LIMIT)
    assert_close(found.noise - found.clean, found.velocity, limit=LIMIT)
    assert found.mask.shape == found.sparse_mask.shape == (2, 3, 4)
    assert bool(((found.mask > 0) & (found.mask < 1)).all())
    selected = found.sparse_mask > 0
    assert selected.flatten(1).sum(dim=1).tolist() == [3, 3]  # a quarter of 12 cells
    assert torch.equal(found.sparse_mask[selected], found.mask[selected])
    assert found.mask[selected].min() >= found.mask[~selected].min()
    assert len(found.early) == 3
    assert_close(found.early[2], three.velocity, limit=LIMIT)


def test_velocity_in_the_projects_convention(model: Exo) -> None:
    prompt, (z, t) = prompt_of(PROMPTS[:1]), latents(2, (4, 4))
    condition = Conditioning(
        context=prompt.token_ids[..., None],
        context_mask=prompt.token_mask,
        extras={"pixels": prompt.pixels, "grids": prompt.grids},
    )
    with torch.no_grad():
        found = velocity(model.forward, z, t, condition)
        twice = velocity(model.forward, z, t, condition.expand(2))
        prefix = encode(model, prompt, (4, 4))
        seen: list[StepResult] = []
        cached = velocity(model.forward, z, t, condition, prefix=prefix, record=seen.append)
    assert_close(found, twice, limit=LIMIT)
    assert_close(cached, twice, limit=LIMIT)
    assert len(seen) == 1


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        (Conditioning(), "must be token ids `b m 1`, whole numbers, got none"),
        (Conditioning(context=torch.zeros(1, 3, 1)), "got torch.float32"),
        (Conditioning(context=torch.zeros(1, 3, 1).long(), extras={"r": torch.zeros(1)}), r"got \['r'\]"),
    ],
)
def test_velocity_refuses(model: Exo, condition: Conditioning, message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        velocity(model.forward, *latents(1, (4, 4)), condition)


def test_bad_inputs_are_named(model: Exo) -> None:
    prompt, (z, t) = prompt_of(PROMPTS), latents(2, (4, 4))
    prefix = encode(model, prompt, (4, 4))
    for bad, message in (
        ((z[:, :4], t), "z must be `b 16 h w`"),
        ((z[..., :2], t), r"must have the size \(4, 4\)"),
        ((z[:1], t[:1]), "must have the batch 2"),
    ):
        with pytest.raises(ShapeError, match=message):
            model.step(*bad, prefix)
    ids, mask = prompt.token_ids, prompt.token_mask
    for arguments, message in (
        ({}, "must come with pixels"),
        ({"pixels": prompt.pixels}, "must be given together"),
        ({"pixels": prompt.pixels[:1], "grids": prompt.grids[:1]}, "for the 2 prompts with image tokens"),
        ({"pixels": prompt.pixels[:, :16], "grids": prompt.grids}, "an image token for each"),
    ):
        with pytest.raises(ShapeError, match=message):
            model.encode(ids, mask, size=(4, 4), **arguments)
    with pytest.raises(ShapeError, match="pad at the right"):
        model.encode(ids, mask.flip(1), size=(4, 4), pixels=prompt.pixels, grids=prompt.grids)


@pytest.mark.parametrize("has_picture", [True, False])
def test_an_answer_is_what_the_whole_text_goes_on_with(model: Exo, has_picture: bool) -> None:
    """Token after token with kept keys and values, for prompts of different lengths, against whole passes."""
    prompt = prompt_of(PROMPTS, has_picture=has_picture)
    mask = prompt.token_mask
    assert mask is not None
    seen = {"pixels": prompt.pixels, "grids": prompt.grids}
    said = model.answer(prompt.token_ids, mask, end=-1, most=6, **seen)
    table = model.get_parameter("trunk.language_model.embed_tokens.weight")
    for row, answer in enumerate(said):
        ids = prompt.token_ids[row : row + 1, mask[row]]
        own = {name: None if part is None else part[row : row + 1] for name, part in seen.items()}
        for token in answer:
            with torch.no_grad():
                states = model.read(ids, torch.ones_like(ids, dtype=torch.bool), **own).passed.hidden
            assert int((states[0, -1] @ table.T).argmax()) == token
            ids = torch.cat([ids, torch.tensor([[token]])], dim=1)
    assert [len(answer) for answer in said] == [6, 6]
    ended = model.answer(prompt.token_ids, mask, end=said[0][2], most=6, **seen)
    assert ended[0] == said[0][: said[0].index(said[0][2])]
    assert said[0][2] in said[1] or ended[1] == said[1]


@pytest.mark.parametrize("through", [True, False])
@pytest.mark.parametrize("is_checkpointed", [True, False])
def test_iterations_that_learn_for_themselves_pass_no_gradient_back(
    through: bool, is_checkpointed: bool
) -> None:
    model, (z, t) = random_exo(), latents(2, (4, 6))
    runtime = Runtime(run_block=run_checkpointed) if is_checkpointed else Runtime()
    prefix = encode(model, prompt_of(PROMPTS), (4, 6))
    plain = model.step(z, t, prefix, iterations=3)
    found = model.step(z, t, prefix, iterations=3, through=through, runtime=runtime)
    compare(found, plain)
    found.velocity.square().mean().backward()
    sizes = model.tokens.iteration.weight.grad.abs().sum(dim=1).tolist()
    assert sizes[2] > 0
    assert [size > 0 for size in sizes[:2]] == [through, through]
    # what the trunk made of the prompts is no iteration's, and still learns
    assert model.trunk.get_parameter("language_model.embed_tokens.weight").grad.abs().max() > 0


def test_prompts_learn_from_the_last_iteration_through_their_keys(model: Exo) -> None:
    prefix = encode(model, prompt_of(PROMPTS), (4, 6))
    for keep in prefix.past.layers[0]:
        keep.retain_grad()
    (z, t) = latents(2, (4, 6))
    model.step(z, t, prefix, iterations=2, through=False).velocity.square().mean().backward()
    assert all(part.grad is not None and part.grad.abs().max() > 0 for part in prefix.past.layers[0])
    model.zero_grad(set_to_none=True)


def test_the_diffusion_blocks_get_their_rows_in_one_piece(model: Exo) -> None:
    """Compiled ones have no finite gradients otherwise."""
    seen: list[bool] = []
    hook = model.diffusion_head.blocks[0].register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[0].is_contiguous())
    )
    with torch.no_grad():
        prefix = encode(model, prompt_of(PROMPTS), (4, 6))
        model.step(*latents(2, (4, 6)), prefix, iterations=1)  # type: ignore[arg-type]
    hook.remove()
    assert seen == [True]
