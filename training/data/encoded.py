"""Samples as latents and text states: what a flow-matching run trains on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from flowcore.conditioning import Conditioning
from training.data.buckets import Bucket
from training.data.cache import Encoded, TensorCache, content_key
from training.data.folder import Sample, load_image
from training.encoders import CaptionEncoder, ImageEncoder
from training.stop import StopFlag

IMAGE_CHUNK, TEXT_CHUNK = 8, 64
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class EncodedSamples:
    """Latents of every sample and token states of every caption, held in memory (or mapped from the cache)."""

    def __init__(
        self,
        samples: Sequence[Sample],
        buckets: Sequence[Bucket],
        image_encoder: ImageEncoder,
        caption_encoder: CaptionEncoder,
        *,
        folder: Path | None,
        dtype: str,
        stop: StopFlag,
    ) -> None:
        """Encodes what the cache does not hold yet.

        Args:
            samples: with `buckets`, the picture size of each.
            image_encoder: of the images.
            caption_encoder: of the captions, and of the empty caption that stands for none.
            folder: cache folder, or None to keep all in memory.
            dtype: in which tensors are stored.
            stop: asked between chunks.
        Raises: DataError for a file that does not decode; Stopped.
        """
        self.samples, self.buckets = list(samples), list(buckets)
        self._latents = TensorCache(folder and folder / f"latents-{image_encoder.identity}-{dtype}")
        self._texts = TensorCache(folder and folder / f"text-{caption_encoder.identity}-{dtype}")
        stored = DTYPES[dtype]
        keys = [_image_key(sample, bucket) for sample, bucket in zip(samples, buckets, strict=True)]
        self._image_keys = keys

        def encode_images(items: list[tuple[Sample, Bucket]]) -> list[Encoded]:
            images = [load_image(sample, bucket) for sample, bucket in items]
            return [{"latents": image_encoder.encode(image[None])[0].to(stored)} for image in images]

        def encode_captions(items: list[str]) -> list[Encoded]:
            coded = caption_encoder.encode(items)
            assert coded.context is not None
            assert coded.context_mask is not None
            lengths = coded.context_mask.sum(1).tolist()
            return [{"context": c[:n].to(stored)} for c, n in zip(coded.context, lengths, strict=True)]

        work = list(dict(zip(keys, zip(samples, buckets, strict=True), strict=True)).items())
        self._latents.fill(work, encode_images, chunk=IMAGE_CHUNK, what="encode images", stop=stop)
        captions = [(content_key(text), text) for text in dict.fromkeys(["", *(s.caption for s in samples)])]
        self._texts.fill(captions, encode_captions, chunk=TEXT_CHUNK, what="encode captions", stop=stop)

    def latents(self, numbers: Sequence[int]) -> Tensor:
        """Latents `b c h w`, float32, of samples of one bucket."""
        return torch.stack([self._latents.entries[self._image_keys[n]]["latents"] for n in numbers]).float()

    def conditioning(self, captions: Sequence[str]) -> Conditioning:
        """Token states of captions of this set (or the empty one), padded to the longest, with their mask."""
        states = [self._texts.entries[content_key(caption)]["context"].float() for caption in captions]
        lengths = torch.tensor([len(s) for s in states])
        context = torch.nn.utils.rnn.pad_sequence(states, batch_first=True)
        return Conditioning(context=context, context_mask=torch.arange(context.shape[1]) < lengths[:, None])


def _image_key(sample: Sample, bucket: Bucket) -> str:
    return content_key(sample.path.read_bytes(), f"{bucket.width}x{bucket.height}")
