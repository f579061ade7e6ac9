"""The bundled weights do what the demo needs of them."""

from itertools import combinations

import numpy as np
import pytest
import torch
from torch import Tensor

from flowcore.assets import builtin, list_builtin
from flowcore.images import image_to_tensor, tensor_to_images
from flowcore.pipeline import Pipeline
from flowcore.text.gemma3 import Gemma3TextEncoder, load_text_encoder
from flowcore.vae.autoencoder import Autoencoder, load_vae
from training.scenes import (
    PALETTE,
    SHAPES,
    accuracy,
    captions_held_out,
    draw,
    iterate_scenes,
    judge,
    random_scene,
)
from training.scenes.captions import vocabulary

SIZE = 128
DEMOS = [name for name in list_builtin() if name.endswith("-demo")]
MAX_BYTES = {"exo-demo": 26e6}  # whose trunk is in the file
MIN_PSNR = 35.0  # decibels; below it shapes are lost in the autoencoder
MIN_SEPARATION = 0.3  # of a state's length, between words of one kind
MIN_OBJECT_SEPARATION = 0.8  # between the states of one word that names one or the other object


@pytest.fixture(scope="module")
def text() -> Gemma3TextEncoder:
    return load_text_encoder("scenes-text")


@pytest.fixture(scope="module")
def vae() -> Autoencoder:
    return load_vae("scenes-vae")


def states(text: Gemma3TextEncoder, caption: str) -> Tensor:
    context = text.encode([caption]).context
    assert context is not None
    return context[0]


def test_text_encoder_knows_every_word_of_the_captions(text: Gemma3TextEncoder) -> None:
    assert text.unknown_words(" ".join(vocabulary())) == []
    assert text.width == 128


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("a {} circle on a white background", sorted(PALETTE)),
        ("a red {} on a white background", sorted(SHAPES)),
        ("a {} red circle on a white background", ["small", "large"]),
    ],
)
def test_captions_that_differ_in_one_word_separate(
    text: Gemma3TextEncoder, template: str, words: list[str]
) -> None:
    assert text.unknown_words(template.format(words[0])) == []
    place = 1 + template.split().index("{}")  # after BOS
    found = {word: states(text, template.format(word))[place] for word in words}
    for first, second in combinations(words, 2):
        length = (found[first].norm() + found[second].norm()) / 2
        distance = float((found[first] - found[second]).norm() / length)
        assert distance >= MIN_SEPARATION, (first, second, distance)


@pytest.mark.parametrize("relation", ["left of", "below", "to the right of"])
def test_a_color_word_says_which_object_it_names(text: Gemma3TextEncoder, relation: str) -> None:
    # the model's text tokens have no positions: at half a state's length it never learned whose color it is
    captions = (f"a red circle {relation} a blue square", f"a blue square {relation} a red circle")
    first, second = (states(text, caption)[1 + caption.split().index("red")] for caption in captions)
    assert float((first - second).norm() / first.norm()) >= MIN_OBJECT_SEPARATION


def test_autoencoder_keeps_scenes_it_has_not_seen(vae: Autoencoder) -> None:
    scenes = list(iterate_scenes(64, 2024, objects="mixed", split="test"))
    images = torch.cat([image_to_tensor(draw(scene, SIZE), SIZE, SIZE) for scene, _ in scenes])
    with torch.no_grad():
        rebuilt = vae.decode(vae.encode(images))
    error = ((images - rebuilt) / 2).square().mean((1, 2, 3))
    assert float((-10 * error.log10()).mean()) >= MIN_PSNR
    verdicts = [
        judge(picture, caption)
        for picture, (_, caption) in zip(tensor_to_images(rebuilt), scenes, strict=True)
    ]
    assert sum(verdict["all"] is True for verdict in verdicts) >= 63


def test_latents_of_scenes_are_normalised(vae: Autoencoder) -> None:
    rng = np.random.default_rng(5)
    scenes = [random_scene(rng, "one") for _ in range(32)]
    images = torch.cat([image_to_tensor(draw(scene, SIZE), SIZE, SIZE) for scene in scenes])
    with torch.no_grad():
        latents = vae.encode(images)
    assert latents.shape == (32, 16, 16, 16)
    assert latents.mean((0, 2, 3)).abs().max() < 0.25
    assert (latents.std((0, 2, 3)) - 1).abs().max() < 0.25


@pytest.mark.parametrize("name", DEMOS)
def test_a_model_names_bundled_parts(name: str) -> None:
    pipeline = Pipeline.from_files(name, device="cpu")
    assert {pipeline.sources[part] for part in ("vae", "text_encoder") if part in pipeline.sources} <= set(
        list_builtin()
    )
    assert pipeline.default_size == (SIZE, SIZE)
    assert builtin(name).stat().st_size < MAX_BYTES.get(name, 6e6)


@pytest.mark.parametrize("name", DEMOS)
def test_a_model_draws_what_it_is_told(name: str) -> None:
    pipeline = Pipeline.from_files(name, device="cpu")
    captions = captions_held_out(12, 77, "one")
    settings = pipeline.settings_type(num_steps=20, cfg_scale=2.0)
    pictures = pipeline.generate(captions, list(range(12)), settings)
    found = accuracy([judge(picture, caption) for picture, caption in zip(pictures, captions, strict=True)])
    assert found["background"] == 1.0
    assert min(found["color"] or 0, found["position"] or 0) >= 0.9
