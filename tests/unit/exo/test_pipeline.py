"""Sampling with Exo: equal to steps written out and to full recomputation, in batches, sizes, iterations."""

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from flowcore.errors import CheckpointError, ConfigError
from flowcore.exo import ExoPipeline, ExoSettings, ExoT2IInference
from flowcore.flow.schedule import sigma_grid
from flowcore.images import SETTINGS_KEY, image_to_tensor
from flowcore.models.exo import Exo
from flowcore.pipeline import Pipeline, draw_noise
from flowcore.settings import Settings
from tests import tiny_exo
from tests.exo_recomputed import Prompt, recomputed_step
from tests.support import CHAIN_LIMIT, FORWARD_LIMIT, assert_close

PROMPTS = ["a red circle", "a blue square left of a green circle"]
SETTINGS = ExoSettings(num_steps=3, width=64, height=32, iterations=2)
LIMIT = 1e-5


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_exo.write_parts(tmp_path_factory.mktemp("exo"))


@pytest.fixture(scope="module")
def pipeline(file: Path) -> ExoPipeline:
    return ExoPipeline.from_pretrained(file, device="cpu")


def picture(seed: int = 0, size: tuple[int, int] = (64, 32)) -> Image.Image:
    """A picture of four blocks of color."""
    pixels = torch.randint(0, 255, (2, 2, 3), generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(pixels.to(torch.uint8).numpy()).resize(size, Image.Resampling.NEAREST)


def sample(
    pipeline: ExoPipeline,
    settings: ExoSettings,
    prompts: list[str] = PROMPTS[:1],
    images: list[Image.Image] | None = None,
) -> Tensor:
    """The pixels of a run, seeds counting up from 1."""
    made = pipeline.refine(prompts, [1 + i for i in range(len(prompts))], settings, init_images=images)
    return torch.cat([image_to_tensor(one.image, one.image.width, one.image.height) for one in made])


def latents_of(pipeline: ExoPipeline, settings: ExoSettings, **options: object) -> Tensor:
    from flowcore.exo.trace import Trace

    trace = Trace(pipeline.device)
    sized = pipeline.sized(settings)
    return pipeline.sample_refined(PROMPTS[:1], [1], sized, trace=trace, **options)


def test_files_of_exo_open_as_any_others(file: Path) -> None:
    opened = Pipeline.from_files(file, device="cpu")
    assert isinstance(opened, ExoPipeline)
    assert (opened.default_size, opened.default_shift(64, 48)) == ((64, 48), 3.0)
    images = opened.generate(PROMPTS, [1, 2], Settings(num_steps=2))  # settings of no special kind
    assert [image.size for image in images] == [(64, 48)] * 2


@pytest.mark.parametrize("iterations", range(1, 9))
def test_cached_sampling_equals_recomputing_everything(pipeline: ExoPipeline, iterations: int) -> None:
    """The whole run, guided, with a picture, against steps that send all tokens through all layers."""
    settings = replace(SETTINGS, iterations=iterations, cfg_scale=2.0)
    pictures = image_to_tensor(picture(), 64, 32)
    x = draw_noise([torch.Generator().manual_seed(1)], (16, 4, 8))
    prompts = []
    for text in (PROMPTS[0], ""):
        told = pipeline.text_encoder.read([text], pictures)
        prompts.append(Prompt(token_ids=told.context[..., 0], token_mask=told.context_mask, **told.extras))
    with torch.no_grad():
        for start, end in pairwise(sigma_grid(3, 3.0).tolist()):
            t = torch.tensor([start])
            with_text, without = (
                recomputed_step(pipeline.exo, x, t, prompt, iterations=iterations).velocity
                for prompt in prompts
            )
            x = x + (end - start) * (without + 2.0 * (with_text - without))
    found = latents_of(pipeline, settings, pictures=pictures)
    assert_close(found, x, limit=LIMIT)


def test_text_alone_and_with_a_picture_differ(pipeline: ExoPipeline) -> None:
    text = sample(pipeline, SETTINGS)
    seen = sample(pipeline, SETTINGS, images=[picture()])
    other = sample(pipeline, SETTINGS, images=[picture(7)])
    assert not torch.equal(text, seen)
    assert not torch.equal(seen, other)


@pytest.mark.parametrize("has_pictures", [True, False])
@pytest.mark.parametrize("size", [(64, 64), (40, 72)])
def test_batch_equals_single_pictures(
    pipeline: ExoPipeline, size: tuple[int, int], has_pictures: bool
) -> None:
    """Prompts of different lengths, a square and odd grids; what is kept of prompts does not matter."""
    settings = replace(SETTINGS, width=size[0], height=size[1])
    images = [picture(0), picture(1)] if has_pictures else None
    made = pipeline.refine(PROMPTS, [1, 2], settings, init_images=images)
    pipeline.prefixes.clear()
    for row, one in enumerate(made):
        alone = pipeline.refine(
            [PROMPTS[row]], [1 + row], settings, init_images=None if images is None else [images[row]]
        )[0]
        assert_close(one.info.mask, alone.info.mask, limit=CHAIN_LIMIT, what="mask")
        difference = image_to_tensor(one.image, *size) - image_to_tensor(alone.image, *size)
        assert float(difference.abs().max()) <= 2 / 127.5  # a rounding of the pixel, at most
        assert one.info.iteration_masks.shape == (2, -(-size[1] // 16), -(-size[0] // 16))


def test_the_same_seed_gives_the_same_picture_whatever_ran_before(pipeline: ExoPipeline) -> None:
    first = sample(pipeline, SETTINGS, images=[picture()])
    sample(pipeline, replace(SETTINGS, width=48, iterations=3), ["something else"])
    assert torch.equal(sample(pipeline, SETTINGS, images=[picture()]), first)


def test_prompts_are_read_once(pipeline: ExoPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    encode = Exo.encode

    def counted(self: Exo, ids: Tensor, *arguments: object, **named: object) -> object:
        read.append(len(ids))
        return encode(self, ids, *arguments, **named)

    monkeypatch.setattr(Exo, "encode", counted)
    pipeline.prefixes.clear()
    sample(pipeline, SETTINGS, PROMPTS)
    assert read == [3]  # two prompts and the empty one, which both share
    sample(pipeline, replace(SETTINGS, iterations=4), PROMPTS[1:])
    assert read == [3]
    sample(pipeline, replace(SETTINGS, width=48), PROMPTS[1:])
    assert read == [3, 2]
    sample(pipeline, SETTINGS, PROMPTS[1:], images=[picture()])
    sample(pipeline, SETTINGS, PROMPTS[1:], images=[picture(1)])
    assert read == [3, 2, 2, 2]
    assert len(pipeline.prefixes) == 4
    with torch.no_grad():
        pipeline.exo.projector.out.bias.add_(0.0)
    sample(pipeline, SETTINGS, PROMPTS[1:], images=[picture(1)])
    assert read == [3, 2, 2, 2, 2]


def test_branches_are_one_batch_inside_the_interval(
    pipeline: ExoPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    step = Exo.step

    def counted(self: Exo, z: Tensor, *arguments: object, **named: object) -> object:
        sizes.append(len(z))
        return step(self, z, *arguments, **named)

    monkeypatch.setattr(Exo, "step", counted)
    sample(pipeline, SETTINGS)
    sample(pipeline, replace(SETTINGS, cfg_scale=1.0))
    sample(pipeline, replace(SETTINGS, cfg_interval=(0.7, 1.0)))  # levels 1, 0.857, 0.6
    assert sizes == [2, 2, 2, 1, 1, 1, 2, 2, 1]


def test_guidance_one_equals_the_conditional_branch(pipeline: ExoPipeline) -> None:
    plain = latents_of(pipeline, replace(SETTINGS, cfg_scale=1.0))
    nowhere = latents_of(pipeline, replace(SETTINGS, cfg_interval=(0.0, 0.0)))
    assert_close(nowhere, plain, limit=FORWARD_LIMIT)
    assert not torch.equal(plain, latents_of(pipeline, SETTINGS))


def test_masks_are_of_the_prompt_and_of_late_steps(pipeline: ExoPipeline) -> None:
    """By hand: the mean over the steps below the level LATE of the branch with the prompt."""
    from flowcore.exo.masks import LATE
    from flowcore.exo.trace import Trace

    settings = replace(SETTINGS, num_steps=20)
    trace = Trace(pipeline.device)
    pipeline.sample_refined(PROMPTS[:1], [1], pipeline.sized(settings), trace=trace)
    assert [round(level, 3) for level, *_ in trace.calls] == [
        round(level, 3) for level in sigma_grid(20, 3.0).tolist()[:-1]
    ]
    info = trace.infos((4, 8), 8, [1], PROMPTS[:1])[0]
    late = [masks[0, -1] for level, masks, _ in trace.calls if level < LATE]
    assert len(late) == 2
    assert_close(info.mask[0].flatten(), torch.stack(late).mean(dim=0), limit=1e-6)
    assert_close(info.mask[0], info.iteration_masks[-1], limit=1e-6)
    assert float((info.iteration_masks[0] - info.iteration_masks[1]).abs().max()) > 0
    assert int((info.sparse_mask > 0).sum()) >= 2  # a quarter of 8 cells, in each step
    assert bool((info.sparse_mask <= info.mask + 1e-6).all())
    assert info.mask_image().size == (64, 32)
    assert info.timings.keys() == {"read prompt", "steps"}
    early = Trace(pipeline.device)
    pipeline.sample_refined(PROMPTS[:1], [1], pipeline.sized(replace(SETTINGS, num_steps=1)), trace=early)
    assert early.infos((4, 8), 8, [1], PROMPTS[:1])[0].mask.shape == (
        1,
        2,
        4,
    )  # the last step, though it is early


def test_preserve_keeps_what_no_mask_marks(pipeline: ExoPipeline, file: Path) -> None:
    pictures = image_to_tensor(picture(), 64, 32)
    with torch.no_grad():
        clean = pipeline.vae.encode(pictures)
    whole = replace(SETTINGS, preserve=1.0)
    closed = ExoPipeline.from_pretrained(file, device="cpu")
    with torch.no_grad():
        closed.exo.edit_head.mask.bias.fill_(-9.0)
    assert torch.equal(latents_of(closed, whole, pictures=pictures), clean)
    half = latents_of(closed, replace(SETTINGS, preserve=0.5), pictures=pictures)
    free = latents_of(closed, SETTINGS, pictures=pictures)
    distance = [float((x - clean).abs().mean()) for x in (half, free)]
    assert 0 < distance[0] < distance[1]
    with torch.no_grad():
        closed.exo.edit_head.mask.bias.fill_(9.0)
    assert_close(
        latents_of(closed, whole, pictures=pictures),
        latents_of(closed, SETTINGS, pictures=pictures),
        limit=CHAIN_LIMIT,
    )


def test_eta_adds_noise_of_the_seed(pipeline: ExoPipeline) -> None:
    plain, noisy, again = (
        latents_of(pipeline, settings)
        for settings in (SETTINGS, replace(SETTINGS, eta=1.0), replace(SETTINGS, eta=1.0, solver="ddim"))
    )
    assert torch.equal(noisy, again)
    assert not torch.equal(plain, noisy)
    assert_close(latents_of(pipeline, replace(SETTINGS, solver="ddim")), plain, limit=CHAIN_LIMIT)


def test_schedules(pipeline: ExoPipeline) -> None:
    assert pipeline.sized(SETTINGS).shift == 3.0
    large = replace(SETTINGS, width=1024, height=1024, num_steps=20, schedule="flux2")
    sized = pipeline.sized(large)
    assert sized.shift == pytest.approx(9.0, abs=0.01)
    assert pipeline.sized(sized) == sized
    assert float(sized.sigmas()[1]) == pytest.approx(9 * 0.95 / (1 + 8 * 0.95), abs=1e-3)


def test_strength_starts_at_the_first_level_below_it() -> None:
    grid = sigma_grid(20, 3.0)
    assert torch.equal(ExoSettings(shift=3.0).sigmas(), grid)
    assert torch.equal(ExoSettings(shift=3.0, strength=0.75).sigmas(), grid[grid <= 0.75 + 1e-9])
    assert float(ExoSettings(shift=3.0, strength=0.75).sigmas()[0]) == 0.75
    with pytest.raises(ConfigError, match=r"strength must be at least 0\.1364, the lowest level of 20 steps"):
        ExoSettings(shift=3.0, strength=0.1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"iterations": 9}, r"iterations must lie in 1\.\.8, got 9"),
        ({"preserve": 1.5}, r"preserve must lie in \[0, 1\], got 1\.5"),
        ({"eta": -0.1}, r"eta must lie in \[0, 1\], got -0\.1"),
        (
            {"eta": 0.5, "solver": "heun"},
            "eta must be 0 with solvers other than euler, ddim, got 0.5 with heun",
        ),
        ({"schedule": "cosine"}, "schedule must be one of shift, flux2, got 'cosine'"),
    ],
)
def test_settings_out_of_range(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ExoSettings(**changes)


def test_wrong_requests_are_named(pipeline: ExoPipeline) -> None:
    with pytest.raises(ConfigError, match=r"preserve must be 0 without an initial image, got 0\.5"):
        pipeline.refine(PROMPTS[:1], [1], replace(SETTINGS, preserve=0.5))
    with pytest.raises(ConfigError, match="strength must be 1 without an initial image"):
        pipeline.refine(PROMPTS[:1], [1], replace(SETTINGS, num_steps=8, strength=0.7))
    with pytest.raises(ConfigError, match="initial images must be one for each of 2 prompts, got 1"):
        pipeline.refine(PROMPTS, [1, 2], SETTINGS, init_images=[picture()])
    with pytest.raises(ConfigError, match="height and width must be multiples of 8, got 32 and 60"):
        pipeline.encode_prompt(PROMPTS, size=(32, 60))
    with pytest.raises(ConfigError, match="must be an Exo file, got a xut model"):
        ExoPipeline.from_pretrained("xut-demo", device="cpu")
    with pytest.raises(ConfigError, match="text encoder of an exo model must be its trunk alone, got 2"):
        Pipeline.from_files(Path(str(pipeline.sources["model"])), text_encoder=["a", "b"])


def test_names_of_the_description(file: Path, pipeline: ExoPipeline) -> None:
    from flowcore.models import exo

    made = exo.ExoT2IInference(file, device="cpu")
    assert isinstance(made, ExoT2IInference)
    settings = {"steps": 2, "refine_iters": 1, "seed": 3}
    image = made.generate(PROMPTS[0], **settings)
    again, info = made.generate_with_info(PROMPTS[0], **settings)
    assert image.tobytes() == again.tobytes()
    assert (image.size, info.seed, len(info.iteration_masks)) == ((64, 48), 3, 1)
    assert made.generate_with_info(PROMPTS[0], 16, 24, steps=1)[1].seed != 3
    with pytest.raises(CheckpointError, match=r"bundled name .*, got 'nowhere'"):
        ExoT2IInference("nowhere")
    prefix = pipeline.encode_prompt(PROMPTS, size=(32, 64))
    z, t = torch.randn(2, 16, 4, 8), torch.tensor([0.5, 0.5])
    with torch.inference_mode():
        out = pipeline.step(z, t, prefix, iters=3)
    assert out.velocity.shape == z.shape
    assert out.mask.shape == out.sparse_mask.shape == (2, 2, 4)
    assert len(out.iterations) == 3


def test_a_file_says_whether_pictures_stand_first(tmp_path: Path, pipeline: ExoPipeline) -> None:
    file = tiny_exo.write_parts(tmp_path, changes={"image_first": True})
    made = ExoPipeline.from_pretrained(file, device="cpu")
    settings = replace(SETTINGS, num_steps=1, cfg_scale=2.0)
    images = image_to_tensor(picture(), 64, 32)
    chats = [one.text_encoder.read(["#"], images).context[0, :, 0].tolist() for one in (pipeline, made)]
    assert sorted(chats[0]) == sorted(chats[1])
    image = made.exo.config.trunk["image_token_id"]
    assert [chat.index(ord("#")) < chat.index(image) for chat in chats] == [True, False]
    assert made.text_encoder.identity != pipeline.text_encoder.identity
    both = made.refine(["red", "green"], [1, 1], settings, init_images=[picture()] * 2)
    alone = made.refine(["green"], [1], settings, init_images=[picture()])[0]
    assert_close(
        image_to_tensor(both[1].image, 64, 32),
        image_to_tensor(alone.image, 64, 32),
        limit=0.01,
        what="picture",
    )
    assert both[0].image.tobytes() != both[1].image.tobytes()


@pytest.fixture(scope="module")
def rewriter(tmp_path_factory: pytest.TempPathFactory) -> ExoPipeline:
    file = tiny_exo.write_parts(tmp_path_factory.mktemp("rewriter"), changes={"rewrites": True})
    return ExoPipeline.from_pretrained(file, device="cpu")


def test_what_is_asked_of_a_picture_is_rewritten_before_it_is_drawn(rewriter: ExoPipeline) -> None:
    settings = replace(SETTINGS, num_steps=1, cfg_scale=1.0)
    said = rewriter.rewrite([*PROMPTS, ""], torch.cat([image_to_tensor(picture(), 64, 32)] * 3))
    assert said[0]
    assert said[0] not in (PROMPTS[0], said[1])
    assert said[2] == ""
    made = rewriter.refine(PROMPTS[:1], [1], settings, init_images=[picture()])[0]
    kept = rewriter.refine([said[0]], [1], replace(settings, rewrite=False), init_images=[picture()])[0]
    assert (made.info.prompt, kept.info.prompt) == (said[0], said[0])
    assert made.image.tobytes() == kept.image.tobytes()
    stated = json.loads(made.image.info[SETTINGS_KEY])
    assert (stated["prompt"], stated["rewritten"]) == (PROMPTS[0], said[0])
    assert "rewritten" not in json.loads(kept.image.info[SETTINGS_KEY])
    plain = rewriter.refine(PROMPTS[:1], [1], settings)[0]
    assert plain.info.prompt == PROMPTS[0]


def test_what_was_rewritten_is_kept(rewriter: ExoPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    images = image_to_tensor(picture(5), 64, 32)
    first = rewriter.rewrite(["a star"], images)
    monkeypatch.setattr(Exo, "answer", lambda *_, **__: [[]])
    assert rewriter.rewrite(["a star"], images) == first
    assert rewriter.rewrite(["a cross"], images) == ["a cross"]  # the trunk has nothing to say to it


def test_the_last_line_of_an_answer_counts(rewriter: ExoPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    said = rewriter.text_encoder.tokenizer.ids("a circle\na blue circle\n")
    monkeypatch.setattr(Exo, "answer", lambda *_, **__: [said])
    assert rewriter.rewrite(["make it blue"], image_to_tensor(picture(6), 64, 32)) == ["a blue circle"]


def test_a_model_that_does_not_rewrite_says_so(pipeline: ExoPipeline) -> None:
    with pytest.raises(ConfigError, match="must be a model that rewrites prompts, got one that does not"):
        pipeline.rewrite(PROMPTS[:1], image_to_tensor(picture(), 64, 32))
