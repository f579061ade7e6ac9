"""The stages of the pipeline: noise, guidance, batches, sizes, parts that do not fit."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.testing import assert_close

from flowcore.conditioning import Conditioning
from flowcore.errors import ConfigError
from flowcore.flow.schedule import sigma_grid
from flowcore.flow.steps import StepState
from flowcore.images import image_to_tensor, tensor_to_images
from flowcore.pipeline import Pipeline, draw_noise, step_noise
from flowcore.settings import Settings
from flowcore.vae.autoencoder import load_vae
from flowcore.vae.latent_spec import LATENT_SPECS
from flowcore.weights.checkpoint import load_model, save_model
from tests import tiny

PROMPTS = ["a red circle", "a blue square left of a green circle"]
SETTINGS = Settings(num_steps=3, width=32, height=16)
# A batch orders its float32 sums otherwise than a single row.
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    return Pipeline.from_files(tiny.write_parts(tmp_path_factory.mktemp("parts")), device="cpu")


def test_noise_is_that_of_torchs_global_generator() -> None:
    torch.manual_seed(11)
    expected = torch.randn(1, 4, 3, 5)
    assert_close(draw_noise([torch.Generator().manual_seed(11)], (4, 3, 5)), expected, atol=0, rtol=0)


def test_noise_of_a_row_depends_on_its_seed_alone() -> None:
    def both(seeds: list[int]) -> Tensor:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        start = draw_noise(generators, (2, 3))
        return torch.stack([start, step_noise(generators)(0, start)])

    assert_close(both([1, 2, 3])[:, 1:2], both([2]), atol=0, rtol=0)


def test_batch_equals_single_pictures(pipeline: Pipeline) -> None:
    together = pipeline.sample(PROMPTS, [1, 2], SETTINGS)
    for index, (prompt, seed) in enumerate(zip(PROMPTS, [1, 2], strict=True)):
        alone = pipeline.sample([prompt], [seed], SETTINGS)
        assert_close(together[index : index + 1], alone, atol=TOLERANCE, rtol=0)


def test_sampling_equals_euler_by_hand(pipeline: Pipeline) -> None:
    """Two separate calls a step, guidance and steps written out."""
    settings = replace(SETTINGS, cfg_scale=2.0, negative_prompt="a green square", shift=1.5)
    x = draw_noise([torch.Generator().manual_seed(3)], (4, 2, 4))
    conditions = [pipeline.text_encoder.encode([text]) for text in (PROMPTS[0], "a green square")]
    sigmas = sigma_grid(3, 1.5).tolist()
    with torch.no_grad():
        for start, end in pairwise(sigmas):
            with_text, without = (pipeline.velocity(x, torch.tensor([start]), c) for c in conditions)
            x = x + (end - start) * (without + 2.0 * (with_text - without))
    assert_close(pipeline.sample([PROMPTS[0]], [3], settings), x, atol=TOLERANCE, rtol=0)


def test_guidance_asks_the_network_once_a_step(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    forward = pipeline.model.model.forward

    def counted(x: Tensor, *arguments: Any, **named: Any) -> Any:  # noqa: ANN401 - passes everything on
        sizes.append(x.shape[0])
        return forward(x, *arguments, **named)

    monkeypatch.setattr(pipeline.model.model, "forward", counted)
    pipeline.sample(PROMPTS, [1, 2], SETTINGS)
    assert sizes == [4, 4, 4]
    sizes.clear()
    pipeline.sample(PROMPTS, [1, 2], replace(SETTINGS, cfg_scale=1.0))
    assert sizes == [2, 2, 2]


def test_guidance_options_change_the_picture(pipeline: Pipeline) -> None:
    variants = [
        SETTINGS,
        replace(SETTINGS, cfg_scale=1.0),
        replace(SETTINGS, cfg_rescale=0.7),
        replace(SETTINGS, cfg_zero=True),
        replace(SETTINGS, cfg_interval=(0.0, 0.5)),
        replace(SETTINGS, negative_prompt="a blue circle"),
        replace(SETTINGS, shift=3.0),
    ]
    results = [pipeline.sample(PROMPTS[:1], [1], settings) for settings in variants]
    for index, first in enumerate(results):
        assert all(float((first - second).abs().max()) > 1e-3 for second in results[:index])


def test_prompt_changes_the_picture(pipeline: Pipeline) -> None:
    first, second = pipeline.sample(PROMPTS, [1, 1], SETTINGS)
    assert float((first - second).abs().max()) > 1e-3


def test_callback_sees_every_step(pipeline: Pipeline) -> None:
    seen: list[StepState] = []
    latents = pipeline.sample(PROMPTS[:1], [1], SETTINGS, callback=seen.append)
    assert [(state.step, state.num_steps) for state in seen] == [(0, 3), (1, 3), (2, 3)]
    assert seen[0].sigma == 1
    assert seen[-1].sigma_next == 0
    assert_close(seen[-1].denoised, latents, atol=TOLERANCE, rtol=0)


def test_strength_starts_between_picture_and_noise(pipeline: Pipeline) -> None:
    clean = torch.ones(1, 4, 2, 4)
    seen: list[StepState] = []
    settings = replace(SETTINGS, strength=0.5)
    pipeline.sample(PROMPTS[:1], [9], settings, clean=clean, callback=seen.append)
    noise = draw_noise([torch.Generator().manual_seed(9)], (4, 2, 4))
    assert seen[0].sigma == pytest.approx(0.5)
    assert_close(seen[0].x, 0.5 * clean + 0.5 * noise)


def test_model_in_bfloat16_leaves_the_state_in_float32(pipeline: Pipeline, tmp_path: Path) -> None:
    half = Pipeline.from_files(tiny.write_parts(tmp_path), device="cpu", dtype="bfloat16")
    latents = half.sample(PROMPTS[:1], [1], SETTINGS)
    assert (half.dtype, latents.dtype) == (torch.bfloat16, torch.float32)
    assert not latents.requires_grad
    assert not torch.equal(latents, pipeline.sample(PROMPTS[:1], [1], SETTINGS))


def test_size_is_the_settings_then_the_pictures_then_the_models(pipeline: Pipeline) -> None:
    def size(settings: Settings, image: Image.Image | None = None) -> tuple[int | None, int | None]:
        sized = pipeline.sized(settings, image)
        return sized.width, sized.height

    image = Image.new("RGB", (45, 37))
    assert size(Settings()) == (32, 24)
    assert size(Settings(), image) == (40, 32)
    assert size(Settings(width=16), image) == (16, 32)
    assert size(Settings(), Image.new("RGB", (3, 3))) == (8, 8)


def test_pooled_mode_gives_another_picture(pipeline: Pipeline) -> None:
    pooled = replace(pipeline, text_mode="pooled")
    first, second = (part.sample(PROMPTS[:1], [1], SETTINGS) for part in (pipeline, pooled))
    assert float((first - second).abs().max()) > 1e-3


def test_any_text_encoder_that_encodes_will_do(pipeline: Pipeline) -> None:
    class Constant:
        def encode(self, prompts: list[str], mode: str = "sequence") -> Conditioning:
            return Conditioning(context=torch.ones(len(prompts), 3, 24) * len(mode))

        def unknown_words(self, prompt: str) -> list[str]:
            return [prompt]

    latents = replace(pipeline, text_encoder=Constant()).sample(PROMPTS, [1, 1], SETTINGS)
    assert_close(latents[0], latents[1], atol=TOLERANCE, rtol=0)


def test_vae_of_other_channels_is_refused(pipeline: Pipeline, tmp_path: Path) -> None:
    tiny.write_parts(tmp_path)
    other = load_vae(tmp_path / tiny.VAE)
    other.spec = LATENT_SPECS["flux1"]
    with pytest.raises(ConfigError, match=r"VAE must have the model's 4 latent channels, got 16 \(flux1\)"):
        replace(pipeline, vae=other)


def test_latent_space_of_the_model_file_goes_first(tmp_path: Path) -> None:
    model = tiny.write_parts(tmp_path)
    assert Pipeline.from_files(model, device="cpu").vae.spec == tiny.SPEC
    loaded = load_model(model)
    stated = {**loaded.metadata, "flowcore.latent_spec": "sdxl"}
    save_model(model, loaded.model.state_dict(), architecture="xut", config=loaded.config, metadata=stated)
    assert Pipeline.from_files(model, device="cpu").vae.spec.name == "sdxl"


@pytest.mark.parametrize(
    ("prompts", "seeds", "message"),
    [
        ([], [], "prompts must be a list with one seed each, got 0"),
        (["a red circle"], [1, 2], "got 1 and 2 seeds"),
        ("ab", [1, 2], "prompts must be a list"),
        (["a red circle"], [2**64], "seed must lie in"),
    ],
)
def test_wrong_requests_are_named(pipeline: Pipeline, prompts: Any, seeds: list[int], message: str) -> None:  # noqa: ANN401
    with pytest.raises(ConfigError, match=message):
        pipeline.sample(prompts, seeds, SETTINGS)


def test_cfg_zero_and_rescale_exclude_each_other() -> None:
    with pytest.raises(ConfigError, match=r"cfg_rescale must be 0 together with cfg_zero, got 0\.5"):
        Settings(cfg_zero=True, cfg_rescale=0.5)


def test_pixels_survive_the_way_to_a_tensor_and_back() -> None:
    image = Image.effect_noise((16, 8), 90).convert("RGB")
    assert tensor_to_images(image_to_tensor(image, 16, 8))[0].tobytes() == image.tobytes()
