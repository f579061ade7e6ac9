"""Prompts and pictures as Exo's trunk takes them: token ids of a chat, and patches.

A published trunk comes with a tokenizer and a chat template; the small trunks read bytes.
"""

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from einops import rearrange, repeat
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from ..conditioning import Conditioning
from ..errors import CheckpointError, ConfigError, ShapeError

IMAGE = "<|image_pad|>"
END = "<|im_end|>"
"""Behind an answer."""
SPECIAL = ("<|im_start|>", END, "<|vision_start|>", "<|vision_end|>", IMAGE, "<|pad|>")
"""Special tokens of the byte tokenizer, numbered from 256 on."""
CELL = 32
"""Pixels on a side of a visual token: 2 x 2 patches of 16."""
LEAST, MOST = 256, 1280
"""Visual tokens of a picture, as the documentation of Qwen3-VL advises."""
_FILES = ("tokenizer.json", "tokenizer_config.json")


class Tokenizer(Protocol):
    """What makes token ids of a prompt in its chat."""

    def chat(self, prompt: str, *, has_image: bool, image_first: bool = False) -> str:
        """Return the chat up to where the answer begins, with one image token for a picture.

        image_first: whether that stands before the prompt.
        """

    def ids(self, text: str) -> list[int]:
        """Return the token ids of a text that holds special tokens."""

    def text(self, ids: Sequence[int]) -> str:
        """Return the text of token ids, without special tokens."""


class ByteTokenizer:
    """Bytes as they are, special tokens, and one token for each of some words; the chat of Qwen.

    A word is taken together with the blank before it, in upper or lower case, where no letter or digit stands
    beside it; `ExoConfig.words` are numbered from behind the special tokens on.
    """

    def __init__(self, words: Sequence[str] = ()) -> None:
        self.words = {word: 256 + len(SPECIAL) + number for number, word in enumerate(words)}
        known = "|".join(re.escape(word) for word in sorted(words, key=len, reverse=True))
        self.pattern = re.compile(rf"((?: |(?<!\w))(?:{known})(?!\w))", re.IGNORECASE) if words else None

    def chat(self, prompt: str, *, has_image: bool, image_first: bool = False) -> str:
        """Return the chat, as `Tokenizer`."""
        image = f"<|vision_start|>{IMAGE}<|vision_end|>" if has_image else ""
        content = image + prompt if image_first else prompt + image
        return f"<|im_start|>user\n{content}<|im_end|>\n<|im_start|>assistant\n"

    def ids(self, text: str) -> list[int]:
        """Return the token ids, as `Tokenizer`."""
        found: list[int] = []
        for piece in re.split(f"({'|'.join(map(re.escape, SPECIAL))})", text):
            found += [256 + SPECIAL.index(piece)] if piece in SPECIAL else self._plain_ids(piece)
        return found

    def text(self, ids: Sequence[int]) -> str:
        """Return the text, as `Tokenizer`; a word has a blank before it."""
        words = {number: word for word, number in self.words.items()}
        parts = (
            f" {words[number]}".encode() if number in words else bytes([number])
            for number in ids
            if number < 256 or number in words
        )
        return b"".join(parts).decode(errors="replace").strip()

    def _plain_ids(self, text: str) -> list[int]:
        found: list[int] = []
        for piece in self.pattern.split(text) if self.pattern else [text]:
            number = self.words.get(piece.strip(" ").lower())
            found += piece.encode("utf-8") if number is None else [number]
        return found


class ChatTokenizer:
    """The tokenizer and chat template of a checkpoint's folder. Raises: CheckpointError if one is missing."""

    def __init__(self, folder: str | Path) -> None:
        from transformers import PreTrainedTokenizerFast

        folder = Path(folder)
        missing = [name for name in _FILES if not (folder / name).is_file()]
        if missing:
            raise CheckpointError(
                f"the trunk {folder} must come with its processor, got no {' and no '.join(missing)}; copy "
                "them from the Qwen3-VL repository into the folder"
            )
        self.network: Any = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
        template = _template(folder) or self.network.chat_template
        if not template:
            raise CheckpointError(
                f"the trunk {folder} must come with a chat template, got none in tokenizer_config.json, "
                "chat_template.json or chat_template.jinja; copy it from the Qwen3-VL repository"
            )
        self.template = template

    def chat(self, prompt: str, *, has_image: bool, image_first: bool = False) -> str:
        """Return the chat, as `Tokenizer`."""
        content = [{"type": "text", "text": prompt}, *([{"type": "image"}] if has_image else [])]
        if image_first:
            content.reverse()
        text: str = self.network.apply_chat_template(
            [{"role": "user", "content": content}],
            chat_template=self.template,
            tokenize=False,
            add_generation_prompt=True,
        )
        return text

    def ids(self, text: str) -> list[int]:
        """Return the token ids, as `Tokenizer`."""
        found: list[int] = self.network(text, add_special_tokens=False)["input_ids"]
        return found

    def text(self, ids: Sequence[int]) -> str:
        """Return the text, as `Tokenizer`."""
        found: str = self.network.decode(ids, skip_special_tokens=True)
        return found.strip()


class PromptReader:
    """What a pipeline has in place of a text encoder: the trunk itself reads its prompts and pictures.

    It has no states of its own; a token is one number.
    """

    width = 1
    pooled_width = None

    def __init__(
        self, tokenizer: Tokenizer, identity: str, *, patch: int = 16, image_first: bool = False
    ) -> None:
        """Join a tokenizer, what caches know it by, and the pixels on a side of the trunk's patches.

        image_first: whether pictures stand before their prompts.
        """
        self.tokenizer = tokenizer
        self.identity = identity
        self.patch = patch
        self.image_first = image_first

    def to(
        self,
        device: torch.device | str | None = None,  # noqa: ARG002 - as `TextEncoder`
        dtype: torch.dtype | None = None,  # noqa: ARG002
    ) -> "PromptReader":
        """Return self: there are no weights."""
        return self

    def encode(
        self,
        prompts: Sequence[str],
        mode: str = "sequence",  # noqa: ARG002 - as `TextEncoder`
    ) -> Conditioning:
        """Return the token ids of prompts without pictures."""
        return self.read(prompts)

    def read(
        self,
        prompts: Sequence[str],
        pictures: Tensor | None = None,
        *,
        answers: Sequence[str] | None = None,
    ) -> Conditioning:
        """Return the token ids of prompts, with a picture `b 3 h w` in [-1, 1] of any size for each.

        Pictures are resized to as many visual tokens as the trunk knows: a published one to 256 to 1280, a
        small one, which reads bytes, to no fewer than they have. answers: what follows each prompt.
        """
        if pictures is not None:
            least = 1 if isinstance(self.tokenizer, ByteTokenizer) else LEAST
            pictures = fit_pictures(pictures, least=least)
        return encode_prompts(
            self.tokenizer,
            prompts,
            pictures,
            answers=answers,
            patch=self.patch,
            image_first=self.image_first,
        )

    def unknown_words(self, prompt: str) -> list[str]:  # noqa: ARG002 - as `TextEncoder`
        """Return nothing: every text has tokens."""
        return []


def encode_prompts(
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    images: Tensor | None = None,
    *,
    answers: Sequence[str] | None = None,
    patch: int = 16,
    image_first: bool = False,
) -> Conditioning:
    """Return conditions for Exo: the context holds token ids `b m 1`, extras the pictures' patches.

    Args:
        tokenizer: of the trunk.
        prompts: one or more; the empty one leads guidance.
        images: a picture for each prompt, `b 3 h w` in [-1, 1], sides multiples of two patches.
        answers: the answer that follows each prompt, up to its end; None = none yet.
        patch: pixels on a side of the trunk's patches.
        image_first: whether pictures stand before their prompts.
    Raises: ConfigError for a prompt with an image token in it; ShapeError for pictures that do not fit.
    """
    for prompt in (*prompts, *(answers or ())):
        if IMAGE in prompt:
            raise ConfigError(f"a prompt must not contain {IMAGE}, got {prompt[:60]!r}; remove it")
    extras: dict[str, Tensor] = {}
    count = 0
    if images is not None:
        if images.ndim != 4 or images.shape[:2] != (len(prompts), 3):
            raise ShapeError(f"images must be `{len(prompts)} 3 h w`, got {tuple(images.shape)}")
        pixels, grids = to_patches(images, patch)
        extras, count = {"pixels": pixels, "grids": grids}, pixels.shape[1] // 4
    rows = []
    for number, prompt in enumerate(prompts):
        chat = tokenizer.chat(prompt, has_image=images is not None, image_first=image_first)
        text = chat.replace(IMAGE, IMAGE * count)
        answer = answer_ids(tokenizer, answers[number]) if answers else []
        rows.append(torch.tensor(tokenizer.ids(text) + answer))
    mask = pad_sequence([torch.ones_like(row, dtype=torch.bool) for row in rows], batch_first=True)
    ids = pad_sequence(rows, batch_first=True)
    return Conditioning(context=ids[..., None], context_mask=mask, extras=extras)


def answer_ids(tokenizer: Tokenizer, answer: str) -> list[int]:
    """Return the token ids of an answer with its end."""
    return tokenizer.ids(answer + END)


def last_line(answer: str) -> str:
    """Return what an answer comes to: its last line, after those in which a model works it out."""
    return answer.strip().rpartition("\n")[2].strip()


def to_patches(images: Tensor, patch: int = 16) -> tuple[Tensor, Tensor]:
    """Return patches `b n k` of pictures `b 3 h w` in [-1, 1], and their grids `b 3`.

    Blocks of 2 x 2 patches lie together, row by row; a patch holds channel, frame (twice the same), row and
    column.
    Raises: ShapeError unless the sides are multiples of two patches.
    """
    rows, columns = (side // patch for side in images.shape[-2:])
    if images.shape[-2] % (2 * patch) or images.shape[-1] % (2 * patch):
        raise ShapeError(
            f"sides of a picture must be multiples of {2 * patch} pixels, got {tuple(images.shape[-2:])}"
        )
    pixels = rearrange(images, "b c (h p1 y) (w p2 x) -> b (h w p1 p2) c y x", p1=2, p2=2, y=patch, x=patch)
    grids = torch.tensor([[1, rows, columns]], device=images.device).expand(len(images), -1)
    return repeat(pixels, "b n c y x -> b n (c t y x)", t=2), grids


def fit_pictures(images: Tensor, *, least: int = LEAST, most: int = MOST) -> Tensor:
    """Return pictures `b 3 h w` resized to a number of visual tokens between least and most.

    The ratio of the sides stays as near as multiples of 32 pixels allow.
    """
    height, width = images.shape[-2:]
    size = [max(CELL, CELL * round(side / CELL)) for side in (height, width)]
    area = height * width
    if size[0] * size[1] > most * CELL**2:
        factor = math.sqrt(most * CELL**2 / area)
        size = [max(CELL, CELL * math.floor(side * factor / CELL)) for side in (height, width)]
    elif size[0] * size[1] < least * CELL**2:
        factor = math.sqrt(least * CELL**2 / area)
        size = [CELL * math.ceil(side * factor / CELL) for side in (height, width)]
    if size == [height, width]:
        return images
    resized = functional.interpolate(images, size=size, mode="bicubic", antialias=True, align_corners=False)
    return resized.clamp(-1, 1)


def _template(folder: Path) -> str | None:
    """Return the chat template that lies in a file of its own, or None."""
    plain, wrapped = folder / "chat_template.jinja", folder / "chat_template.json"
    if plain.is_file():
        return plain.read_text(encoding="utf-8")
    if not wrapped.is_file():
        return None
    try:
        return str(json.loads(wrapped.read_text(encoding="utf-8"))["chat_template"])
    except (ValueError, KeyError, TypeError) as err:
        raise CheckpointError(f"{wrapped} must be JSON with a chat_template, got a fault at {err}") from err
