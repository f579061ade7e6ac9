"""Judges whether a picture shows what its caption says, from pixels alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .captions import Meaning, MeantObject, parse_caption
from .scene import PALETTE
from .see import Part, Sight, see

Verdict = dict[str, "bool | None"]
"""Right, wrong, or None where the caption is silent, for each of `ATTRIBUTES` and for `all` of them."""

ATTRIBUTES = ("color", "background", "shape", "position", "size", "relation")


def judge(image: NDArray[np.uint8] | Image.Image, caption: str) -> Verdict:
    """Compare a picture with its caption.

    The picture is seen before the caption is read. A picture with too few or too many parts, or with stray
    specks, has every named attribute of its objects wrong; the background is judged by itself.

    Args:
        image: RGB, `h w 3`.
        caption: One that `parse_caption` understands.

    Raises:
        SceneError: If the image has another shape or type, or the caption is none of a scene.
    """
    return compare(see(image), parse_caption(caption))


def compare(sight: Sight, meaning: Meaning) -> Verdict:
    """Verdict about a seen picture and a parsed caption."""
    verdict: Verdict = dict.fromkeys(ATTRIBUTES)
    if meaning.background:
        verdict["background"] = sight.background == meaning.background
    parts = _match(sight.parts, meaning.objects) if sight.is_clean else None
    pairs = list(zip(parts, meaning.objects, strict=True)) if parts else []
    verdict["color"] = bool(pairs) and all(part.color == meant.color for part, meant in pairs)
    verdict["shape"] = bool(pairs) and all(part.shape == meant.shape for part, meant in pairs)
    if any(meant.size for meant in meaning.objects):
        verdict["size"] = bool(pairs) and all(meant.size in {None, part.size} for part, meant in pairs)
    if any(meant.position for meant in meaning.objects):
        verdict["position"] = bool(pairs) and all(meant.position == part.position for part, meant in pairs)
    if meaning.relation:
        verdict["relation"] = parts is not None and _is_related(parts[0], parts[1], meaning.relation)
    verdict["all"] = all(value is not False for value in verdict.values())
    return verdict


def accuracy(verdicts: Iterable[Mapping[str, bool | None]]) -> dict[str, float | None]:
    """Share of right verdicts among those that name the attribute, None where none does."""
    judged = list(verdicts)
    result: dict[str, float | None] = {}
    for name in (*ATTRIBUTES, "all"):
        values = [verdict[name] for verdict in judged if verdict[name] is not None]
        result[name] = sum(map(bool, values)) / len(values) if values else None
    return result


def _match(parts: Sequence[Part], objects: Sequence[MeantObject]) -> tuple[Part, ...] | None:
    """Parts in the order of the caption's objects, colour deciding and shape breaking ties."""
    if len(parts) != len(objects):
        return None
    orders = [tuple(parts)] if len(parts) == 1 else [tuple(parts), tuple(reversed(parts))]
    return min(orders, key=lambda order: sum(map(_difference, order, objects)))


def _difference(part: Part, meant: MeantObject) -> float:
    distance = float(np.linalg.norm(np.subtract(part.rgb, PALETTE[meant.color])))
    return distance + 40.0 * (part.shape != meant.shape)


def _is_related(first: Part, second: Part, relation: str) -> bool:
    """Whether the first part lies apart from the second, and more along the named axis than across it."""
    along, across = (0, 1) if relation == "left of" else (1, 0)
    step = [second.center[axis] - first.center[axis] for axis in (0, 1)]
    reach = first.half_extent[along] + second.half_extent[along]
    return step[along] > abs(step[across]) and step[along] > 0.9 * reach
