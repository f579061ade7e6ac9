"""What the trunk makes of prompts. Those that begin with one picture share all up to behind it."""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ...ops import Runtime
from .lora import TrunkLora
from .trunk import KeysValues, Pass, Past, Picture, causal_mask, run_decoder


class Reading(NamedTuple):
    """What the trunk makes of prompts: its pass, their positions `3 b m`, and what it sees of pictures."""

    passed: Pass
    positions: Tensor
    picture: Picture | None


def shared_start(token_ids: Tensor, mask: Tensor, is_image: Tensor, pixels: Tensor | None) -> int:
    """Return how many tokens several prompts `b m` begin with alike, up to behind their one picture or more.

    0 where they have different pictures or none, where something else stands before them, and on the device
    "meta".
    """
    if token_ids.is_meta or pixels is None or not len(pixels) == len(token_ids) > 1:
        return 0
    alike = int((token_ids == token_ids[:1]).all(dim=0).cumprod(dim=0).sum())
    alike = min(alike, int(mask.sum(dim=1).min()) - 1)
    if bool(is_image[:, alike:].any()) or bool((pixels != pixels[:1]).any()):
        return 0
    return alike


def read_on(
    trunk: nn.Module,
    start: Reading,
    token_ids: Tensor,
    mask: Tensor,
    positions: Tensor,
    *,
    taps: Sequence[int],
    lora: TrunkLora | None,
    runtime: Runtime,
) -> Reading:
    """Return the reading of whole prompts, of which one has been read up to where they part.

    Shapes: start of one prompt; token_ids, mask `b m` and positions `3 b m` of all of them. The rest is as in
    `run_decoder`.
    """
    batch, first = len(token_ids), start.passed.past.length

    def spread(part: Tensor) -> Tensor:
        return part.expand(batch, *part.shape[1:])

    rest = run_decoder(
        trunk,
        trunk.get_submodule("language_model.embed_tokens")(token_ids[:, first:]),
        positions[..., first:],
        keep=causal_mask(mask)[:, :, first:],
        past=Past(tuple(KeysValues(*map(spread, layer)) for layer in start.passed.past.layers), first),
        taps=taps,
        after=lambda _, h: h,
        lora=lora,
        runtime=runtime,
    )

    def whole(before: Tensor, behind: Tensor) -> Tensor:
        return torch.cat([spread(before), behind], dim=1)

    seen = start.picture
    return Reading(
        Pass(
            hidden=whole(start.passed.hidden, rest.hidden),
            taps=tuple(map(whole, start.passed.taps, rest.taps)),
            past=rest.past,
        ),
        positions,
        None
        if seen is None
        else replace(seen, tokens=spread(seen.tokens), deep=tuple(map(spread, seen.deep))),
    )
