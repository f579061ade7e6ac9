"""The encoders that need no weights, and how the others are chosen."""

from pathlib import Path

import pytest
import torch

from flowcore.conditioning import TextShape
from flowcore.errors import CheckpointError, ConfigError
from tests.tiny import TEXT, VAE, write_parts
from training.encoders import ByteEncoder, PixelEncoder, caption_encoder, image_encoder

CPU = torch.device("cpu")


@pytest.mark.parametrize("channels", [1, 3, 4, 16])
def test_pixels_are_averaged_over_a_cell_and_repeated(channels: int) -> None:
    images = torch.rand(2, 3, 16, 24) * 2 - 1
    latents = PixelEncoder(channels).encode(images)
    assert latents.shape == (2, channels, 2, 3)
    for channel in range(channels):
        cell = images[1, channel % 3, 8:16, 16:24].mean()
        assert torch.isclose(latents[1, channel, 1, 2], cell, atol=1e-6)


@pytest.mark.parametrize("channels", [1, 4])
def test_latents_of_flat_images_decode_to_them(channels: int) -> None:
    encoder = PixelEncoder(channels)
    image = torch.full((1, 3, 16, 16), 0.25)
    assert torch.allclose(encoder.decode(encoder.encode(image)), image)


def test_bytes_are_one_token_each_cut_and_padded() -> None:
    coded = ByteEncoder(8, 6).encode(["ab", "", "abcdefgh", "é"])
    assert coded.context is not None
    assert coded.context_mask is not None
    assert coded.pooled is not None
    assert coded.context.shape == (4, 6, 8)
    assert coded.context_mask.sum(1).tolist() == [2, 1, 6, 2]
    assert torch.equal(coded.context[0, :2], coded.context[2, :2])
    assert coded.context[0, 2:].abs().max() == 0
    assert torch.allclose(coded.pooled[0], coded.context[0, :2].mean(0))


def test_bytes_do_not_depend_on_their_batch() -> None:
    encoder = ByteEncoder(8, 6)
    together, alone = encoder.encode(["abc", "d"]), encoder.encode(["d"])
    assert together.context is not None
    assert alone.context is not None
    assert torch.equal(together.context[1], alone.context[0])


def shape(width: int, length: int, pooled: int | None = None, *, needs_pooled: bool = False) -> TextShape:
    return TextShape(width=width, length=length, pooled=pooled, needs_pooled=needs_pooled)


def test_the_built_in_encoders_are_the_default() -> None:
    assert image_encoder(None, 4, "sdxl", CPU).identity == image_encoder("pixels", 4, "sdxl", CPU).identity
    six, seven = (caption_encoder(["bytes"], shape(8, length), CPU).identity for length in (6, 7))
    assert caption_encoder([], shape(8, 6), CPU).identity == six
    assert seven != six


def test_encoders_from_files_must_fit_the_model(tmp_path: Path) -> None:
    write_parts(tmp_path)
    vae, text = str(tmp_path / VAE), str(tmp_path / TEXT)
    images = image_encoder(vae, 4, "sdxl", CPU)
    assert images.encode(torch.zeros(1, 3, 16, 16)).shape == (1, 4, 2, 2)
    assert caption_encoder([text], shape(24, 16), CPU).encode(["a red circle"]).context is not None
    with pytest.raises(ConfigError, match=r"encoders\.vae: .*must have the model's 16 channels, got 4"):
        image_encoder(vae, 16, "sdxl", CPU)
    with pytest.raises(ConfigError, match=r"encoders\.text: .*the model's width 128, got 24"):
        caption_encoder([text], shape(128, 16), CPU)
    (tmp_path / "junk.safetensors").write_bytes(b"junk")
    with pytest.raises(CheckpointError, match=r"junk\.safetensors"):
        image_encoder(str(tmp_path / "junk.safetensors"), 4, "sdxl", CPU)


def test_other_weights_have_another_identity(tmp_path: Path) -> None:
    write_parts(tmp_path)
    first = image_encoder(str(tmp_path / VAE), 4, "sdxl", CPU).identity
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "x.safetensors").write_bytes((tmp_path / VAE).read_bytes())
    assert image_encoder(str(tmp_path / "copy" / "x.safetensors"), 4, "sdxl", CPU).identity == first


def test_texts_of_files_are_cut_to_the_length_of_the_model(tmp_path: Path) -> None:
    write_parts(tmp_path)
    coded = caption_encoder([str(tmp_path / TEXT)], shape(24, 3), CPU).encode(["a red circle", ""])
    assert coded.context is not None
    assert coded.context_mask is not None
    assert coded.context.shape == (2, 3, 24)
    assert coded.context_mask.sum(1).tolist() == [3, 1]


def test_a_pooled_vector_must_be_there_where_the_model_needs_it_and_fit(tmp_path: Path) -> None:
    write_parts(tmp_path)
    text = str(tmp_path / TEXT)
    assert caption_encoder([text], shape(24, 16, 24), CPU).encode(["a"]).pooled is None
    pooled = caption_encoder(["bytes"], shape(24, 16, 24, needs_pooled=True), CPU).encode(["a"]).pooled
    assert pooled is not None
    assert pooled.shape == (1, 24)
    with pytest.raises(ConfigError, match=r"encoders\.text: .*CLIP text model of width 24"):
        caption_encoder([text], shape(24, 16, 24, needs_pooled=True), CPU)
    with pytest.raises(
        ConfigError, match=r"encoders\.text must .*pooled vector of .*width 7, got bytes, which gives 24"
    ):
        caption_encoder(["bytes"], shape(24, 16, 7), CPU)


def test_a_model_without_text_is_refused() -> None:
    with pytest.raises(ConfigError, match="got one that reads none"):
        caption_encoder(["bytes"], TextShape(width=None, length=8), CPU)
