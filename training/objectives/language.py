"""Objective of the demo's text encoder: next word, present word and the words before it.

In a template language the next word does not depend on which colour or shape was just said, so next-word
training alone forgets it: the states of "circle" and "star" end up 4 % of their length apart. The present
word, read from the last hidden state through a fixed random head, keeps them apart. The words before it, read
in the same way, tell one "red" from another: a model that gives its text tokens no positions knows only from
the states which object a word belongs to.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from flowcore.conditioning import Conditioning
from training.data.order import BatchOrder
from training.files import write_atomic
from training.keys import generator
from training.stop import StopFlag

if TYPE_CHECKING:
    from flowcore.text.gemma3 import Gemma3TextEncoder

HEAD_STD, HEAD_GAIN = 0.02, 4.0
LOOKBACK = 5
"""Words before the present one that a state must tell: "left of a large blue square" from end to end."""
PLACE_SHARE = 0.3
"""Weight of the places of visual tokens beside the words of captions."""


def next_loss(states: Tensor, table: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """Cross-entropy of each next token by the embeddings `v d`, of states `b m d`, ids and mask `b m`."""
    following = functional.linear(states[:, :-1][mask[:, 1:]].float(), table.float())
    return functional.cross_entropy(following, ids[:, 1:][mask[:, 1:]])


class TokenHeads:
    """Fixed random heads, one for each distance, that read the present token and the LOOKBACK before it."""

    def __init__(self, vocab: int, width: int, seed: int, device: torch.device) -> None:
        """Heads for states of a width, over a vocabulary."""
        heads = torch.randn(1 + LOOKBACK, vocab, width, generator=generator(seed, "head"))
        self.heads = heads.mul(HEAD_GAIN * HEAD_STD).to(device)

    def spoken_loss(self, states: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """Cross-entropy of the present token, plus the mean of the earlier ones', of states `b m d`."""
        start = ids[:, :1].expand(-1, LOOKBACK)
        spoken = torch.cat((start, ids), dim=1).unfold(1, 1 + LOOKBACK, 1).flip(2)  # b m k
        logits = torch.einsum("n d, k v d -> n v k", states[mask].float(), self.heads)
        told = functional.cross_entropy(logits, spoken[mask], reduction="none").mean(0)
        return told[0] + told[1:].mean()


class CaptionWords:
    """The words of captions as labels of what a picture shows: a word counts the more the fewer say it.

    Source: Joulin et al. 2016, arXiv:1511.02251.
    """

    def __init__(self, captions: Sequence[Sequence[int]], vocab: int, device: torch.device) -> None:
        """Counts the captions `n` that hold each token of a vocabulary."""
        said = torch.zeros(vocab)
        for caption in captions:
            said[sorted(set(caption))] += 1
        self.worth = torch.log((len(captions) + 1) / (said + 1)).to(device)

    def loss(self, tokens: Tensor, table: Tensor, captions: Sequence[Sequence[int]]) -> Tensor:
        """Cross-entropy of the words of captions `b` by the embeddings `v d`, of visual tokens `b n d`.

        Each visual token speaks for the words that it likes best; a picture says what any of them says.
        """
        spoken = functional.linear(tokens.float(), table.float()).logsumexp(dim=1).log_softmax(dim=1)
        labels = torch.zeros_like(spoken)
        for row, caption in zip(labels, captions, strict=True):
            row[sorted(set(caption))] = 1
        labels = labels * self.worth
        return -(labels * spoken).sum() / labels.sum().clamp(min=1)


def place_loss(tokens: Tensor, grid: tuple[int, int], seed: int) -> Tensor:
    """Cross-entropy of the row and the column of each visual token, read by fixed random heads.

    Trained on latents and words alone, their states hold no trace of it.
    Shapes: tokens `b n d`, row by row of a grid (rows, columns).
    """
    rows, columns = grid
    heads = torch.randn(rows + columns, tokens.shape[-1], generator=generator(seed, "place"))
    told = functional.linear(tokens.flatten(0, 1).float(), heads.mul(HEAD_GAIN * HEAD_STD).to(tokens.device))
    row = torch.arange(rows, device=tokens.device).repeat_interleave(columns).repeat(len(tokens))
    column = torch.arange(columns, device=tokens.device).repeat(rows * len(tokens))
    by_row, by_column = told.split([rows, columns], dim=1)
    return functional.cross_entropy(by_row, row) + functional.cross_entropy(by_column, column)


class LanguageObjective:
    """Cross-entropy of the next token, plus that of the present and of the LOOKBACK tokens before it."""

    def __init__(
        self,
        encoder: Gemma3TextEncoder,
        captions: Sequence[str],
        *,
        seed: int,
        batch_size: int,
        device: torch.device,
    ) -> None:
        """Tokenizes all captions; the encoder's weights are trained."""
        self.module = encoder.model.to(device).requires_grad_(True)
        self.encoder, self.device = encoder, device
        self.ids, self.mask = encoder.tokenize(captions)
        self.order = BatchOrder(seed, (len(captions),), batch_size)
        vocab, width = encoder.model.embed_tokens.weight.shape
        self.heads = TokenHeads(vocab, width, seed, device)

    def batch_keys(self, step: int) -> tuple[str, list[str]]:
        """One bucket for all, and the numbers of the captions of a step's global batch."""
        return "captions", [str(number) for number in self.order.batch(step)[1]]

    def loss(self, step: int, part: slice) -> Tensor:
        """Sum of the cross-entropies over the real tokens of samples `part`."""
        from flowcore.text.gemma3 import text_states

        _, numbers = self.order.batch(step)
        rows = torch.tensor(numbers[part])
        mask = self.mask[rows]
        length = int(mask.sum(1).max())
        ids, mask = self.ids[rows, :length].to(self.device), mask[:, :length].to(self.device)
        states = text_states(self.module, ids, mask).float()  # b m d
        table = self.module.embed_tokens.weight
        return next_loss(states, table, ids, mask) + self.heads.spoken_loss(states, ids, mask)

    def preview(self, folder: Path, step: int, stop: StopFlag) -> dict[str, float]:
        """How far apart the states of words of one kind lie, as a share of their length."""
        stop.check()
        values = {f"separation/{kind}": separation(self.encoder, kind) for kind in SWAPS}
        values["separation/object"] = object_separation(self.encoder)
        write_atomic(folder / f"step-{step:08d}.json", json.dumps(values, indent=1) + "\n")
        return values


SWAPS = {
    "shape": (
        "a small red {} at the top left on a blue background",
        ("circle", "square", "triangle", "star"),
    ),
    "color": ("a small {} circle at the top left on a blue background", ("red", "green", "yellow", "purple")),
    "background": (
        "a small red circle at the top left on a {} background",
        ("blue", "green", "white", "black"),
    ),
    "size": ("a {} red circle at the top left on a blue background", ("small", "medium", "large")),
}


@torch.no_grad()
def separation(encoder: Gemma3TextEncoder, kind: str) -> float:
    """Smallest distance between the states of exchanged words at their own place, over their mean length."""
    template, words = SWAPS[kind]
    place = template.split().index("{}") + 1
    coded: Conditioning = encoder.encode([template.format(word) for word in words])
    assert coded.context is not None
    states = coded.context[:, place]
    distances = torch.pdist(states)
    return float(distances.min() / states.norm(dim=1).mean())


@torch.no_grad()
def object_separation(encoder: Gemma3TextEncoder) -> float:
    """Smallest distance between the states of a colour word that names one or the other of two objects."""
    captions = ("a {} circle left of a blue square", "a blue square left of a {} circle")
    ratios = []
    for word in SWAPS["color"][1]:
        coded = encoder.encode([caption.format(word) for caption in captions])
        assert coded.context is not None
        states = torch.stack([coded.context[i, c.split().index("{}") + 1] for i, c in enumerate(captions)])
        ratios.append(float(torch.dist(*states) / states.norm(dim=1).mean()))
    return min(ratios)
