"""Samples as latents and text states: what a flow-matching run trains on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from flowcore.conditioning import Conditioning
from training.data.buckets import Bucket
from training.data.cache import Encoded, TensorCache, content_key
from training.data.images import load_image
from training.data.sample import LATENTS, SOURCE_LATENTS, DataError, Reject, Sample, SampleError
from training.data.stored import StoredFiles, check_channels, check_told, without_padding
from training.data.trajectories import check_space, draw_start
from training.encoders import CaptionEncoder, ImageEncoder
from training.stop import StopFlag

TEXT_CHUNK = 64
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class EncodedSamples:
    """Latents of every sample and token states of every caption, in memory or mapped from the cache.

    Attributes:
        samples: those that could be encoded.
        buckets: the picture size of each.
        rejects: the files of the others, if they are left out.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        buckets: Sequence[Bucket],
        image_encoder: ImageEncoder,
        caption_encoder: CaptionEncoder | None,
        *,
        folder: Path | None,
        dtype: str,
        stop: StopFlag,
        is_lenient: bool = False,
    ) -> None:
        """Encodes what the cache does not hold yet.

        Args:
            samples: what to encode.
            buckets: the picture size of each sample.
            image_encoder: of the images.
            caption_encoder: of the captions, and of the empty caption that stands for none; None leaves them
                as they are, then there is no `conditioning`.
            folder: cache folder, or None to keep all in memory.
            dtype: in which tensors are stored.
            stop: asked between samples.
            is_lenient: leave a file that cannot be used out instead of raising.

        Raises: DataError for a file that does not decode, or encodes to values that are not finite;
            StoppedError.
        """
        self._dtype, self._stop, self._is_lenient = DTYPES[dtype], stop, is_lenient
        self._latents = TensorCache(folder and folder / f"latents-{image_encoder.identity}-{dtype}", stop)
        self.samples: list[Sample] = []
        self.buckets: list[Bucket] = []
        self.rejects: list[Reject] = []
        self._image_keys: list[str] = []
        self._source_keys: list[str] = []
        self._told: dict[int, Encoded] = {}
        work = list(zip(samples, buckets, strict=True))
        self._encode_images([item for item in work if not item[0].stored], image_encoder)
        self._take_stored([item for item in work if item[0].stored], image_encoder)
        if not self.samples:
            first = self.rejects[0]
            raise DataError(f"datasets must hold a usable image, got none; {first.path}: {first.reason}")
        self._text_keys: dict[str, str] = {}
        if caption_encoder:
            texts = folder and folder / f"text-{caption_encoder.identity}-{dtype}"
            self._texts = TensorCache(texts, stop)
            self._encode_captions(caption_encoder)
            for number, told in self._told.items():
                check_told(self.samples[number].path, told, self._text(number, is_dropped=True))

    def latents(self, numbers: Sequence[int]) -> Tensor:
        """Latents `b c h w`, float32, of samples of one bucket."""
        return self._stacked([self._image_keys[n] for n in numbers])

    def source_latents(self, numbers: Sequence[int]) -> Tensor:
        """Latents `b c h w`, float32, of the source pictures of samples that have one, of one bucket."""
        return self._stacked([self._source_keys[n] for n in numbers])

    def noise(self, number: int, draw: torch.Generator) -> Tensor:
        """Noise `c h w`, float32: that which the sample's latents belong to, else as drawn."""
        stored = self.samples[number].stored
        shape = self._latents.entries[self._image_keys[number]]["latents"].shape
        if stored is None or stored.noise_seed is None:
            return torch.randn(shape, generator=draw)
        return draw_start(stored.noise_seed, shape)

    def conditioning(self, numbers: Sequence[int], dropped: Sequence[bool] | None = None) -> Conditioning:
        """Token states of the captions of samples, padded to the longest, with their mask.

        And their pooled vectors, if there are some. dropped: which samples get the empty caption instead.
        """
        is_dropped = dropped or [False] * len(numbers)
        texts = [
            self._text(number, is_dropped=drop) for number, drop in zip(numbers, is_dropped, strict=True)
        ]
        lengths = torch.tensor([len(text["context"]) for text in texts])
        states = [text["context"].float() for text in texts]
        context = torch.nn.utils.rnn.pad_sequence(states, batch_first=True)
        return Conditioning(
            context=context,
            context_mask=torch.arange(context.shape[1]) < lengths[:, None],
            pooled=torch.stack([text["pooled"].float() for text in texts]) if "pooled" in texts[0] else None,
        )

    def told(self, number: int) -> Encoded:
        """What the file of a sample that `is_told` holds besides latents, without padding."""
        return self._told[number]

    def _text(self, number: int, *, is_dropped: bool) -> Encoded:
        if number in self._told and not is_dropped:
            return self._told[number]
        return self._texts.entries[self._text_keys["" if is_dropped else self.samples[number].caption]]

    def _stacked(self, keys: Sequence[str]) -> Tensor:
        return torch.stack([self._latents.entries[key]["latents"] for key in keys]).float()

    def _encode_images(self, work: list[tuple[Sample, Bucket]], encoder: ImageEncoder) -> None:
        """Encodes each picture alone, so that its bits do not depend on its neighbours."""
        pictures = [(sample.path, bucket) for sample, bucket in work]
        pictures += [(sample.source, bucket) for sample, bucket in work if sample.source]
        found, refused = self._image_keys_of(list(dict.fromkeys(pictures)))
        distinct = {key: picture for picture, key in found.items() if key not in refused}

        def encode(items: list[tuple[str, tuple[Path, Bucket]]]) -> list[Encoded | None]:
            ((key, (path, bucket)),) = items
            try:
                return [{"latents": self._encode_image(path, bucket, encoder)}]
            except SampleError as err:
                if not self._is_lenient:
                    raise
                refused[key] = err.reason
                return [None]

        self._latents.fill(list(distinct.items()), encode, chunk=1, what="encode images")
        for sample, bucket in work:
            paths = [path for path in (sample.path, sample.source) if path]
            keys = [found[path, bucket] for path in paths]
            faults = [
                Reject(path, refused[key]) for path, key in zip(paths, keys, strict=True) if key in refused
            ]
            if not faults:
                self.samples.append(sample)
                self.buckets.append(bucket)
                self._image_keys.append(keys[0])
                self._source_keys.append(keys[-1])
            elif faults[0] not in self.rejects:
                self.rejects.append(faults[0])

    def _take_stored(self, work: list[tuple[Sample, Bucket]], encoder: ImageEncoder) -> None:
        """Latents that samples have already, and what lies with them, from their files."""
        for path, space in {s.path.parent: s.stored.space for s, _ in work if s.stored}.items():
            if space is not None:
                check_space(space, encoder, path)
        files = StoredFiles()
        for sample, bucket in work:
            try:
                tensors = files.read(sample)
            except SampleError as err:
                if not self._is_lenient:
                    raise
                self.rejects.append(Reject(err.path, err.reason))
                continue
            check_channels(sample, tensors[LATENTS], encoder.channels)
            key = f"{sample.path}:{sample.key}"
            self._latents.entries[key] = {LATENTS: tensors.pop(LATENTS)}
            source = tensors.pop(SOURCE_LATENTS, None)
            if source is not None:
                self._latents.entries[f"{key}:source"] = {LATENTS: source}
            if sample.is_told:
                self._told[len(self.samples)] = without_padding(tensors)
            self.samples.append(sample)
            self.buckets.append(bucket)
            self._image_keys.append(key)
            self._source_keys.append(key if source is None else f"{key}:source")

    def _image_keys_of(
        self, pictures: list[tuple[Path, Bucket]]
    ) -> tuple[dict[tuple[Path, Bucket], str], dict[str, str]]:
        """Content keys by picture, and the reasons why some cannot be read, by key."""
        keys: dict[tuple[Path, Bucket], str] = {}
        refused: dict[str, str] = {}
        for path, bucket in tqdm(pictures, desc="read images", unit="image", leave=False, delay=5):
            self._stop.check()
            try:
                content = path.read_bytes()
            except OSError as err:
                unreadable = SampleError(path, f"image must be readable, got {err.strerror}")
                if not self._is_lenient:
                    raise unreadable from err
                keys[path, bucket] = str(path)
                refused[str(path)] = unreadable.reason
                continue
            keys[path, bucket] = content_key(content, f"{bucket.width}x{bucket.height}")
        return keys, refused

    def _encode_image(self, path: Path, bucket: Bucket, encoder: ImageEncoder) -> Tensor:
        latents = encoder.encode(load_image(path, bucket)[None])[0].to(self._dtype)
        if not torch.isfinite(latents).all():
            raise SampleError(path, "latents of the image must be finite, got others")
        return latents

    def _encode_captions(self, encoder: CaptionEncoder) -> None:
        """Encodes captions in chunks; a chunk is known by all it holds: padding may change the last bit."""
        captions = list(dict.fromkeys(["", *(sample.caption for sample in self.samples)]))
        for first in range(0, len(captions), TEXT_CHUNK):
            part = captions[first : first + TEXT_CHUNK]
            together = content_key(*part)
            self._text_keys.update({caption: content_key(together, caption) for caption in part})

        def encode(items: list[tuple[str, str]]) -> list[Encoded | None]:
            coded = encoder.encode([caption for _, caption in items])
            results: list[Encoded | None] = []
            for (_, caption), parts in zip(items, _rows(coded), strict=True):
                if not all(torch.isfinite(part).all() for part in parts.values()):
                    raise DataError(f"text states of caption {caption!r} must be finite, got others")
                results.append({name: part.to(self._dtype).clone() for name, part in parts.items()})
            return results

        work = [(key, caption) for caption, key in self._text_keys.items()]
        self._texts.fill(work, encode, chunk=TEXT_CHUNK, what="encode captions")


def _rows(coded: Conditioning) -> list[Encoded]:
    """Each caption's states `m d`, without padding, and its pooled vector `k` if there is one."""
    assert coded.context is not None
    rows: list[Encoded] = [{"context": states} for states in coded.context]
    if coded.context_mask is not None:
        lengths = coded.context_mask.sum(1).tolist()
        rows = [{"context": row["context"][:length]} for row, length in zip(rows, lengths, strict=True)]
    if coded.pooled is not None:
        rows = [{**row, "pooled": pooled} for row, pooled in zip(rows, coded.pooled, strict=True)]
    return rows
