"""Passes through a Qwen3-VL of transformers: the prompt and its picture once, short suffixes many times.

The modules are the library's; the loop over decoder layers is this project's, for it takes keys and values of
earlier tokens as arguments. So it can be checkpointed, depends on no cache class, and adapters need no hooks.
transformers is imported when a trunk is built.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.nn import functional

from ...errors import ConfigError, ShapeError, settings_fit
from ...layers.attention import AttentionFn, causal, sdpa
from ...ops import Runtime
from .lora import LowRank, TrunkLora, project
from .trunk_config import MERGE, TrunkConfig, check_trunk

_ATTENTION = "flowcore"
"""What transformers knows the attention of the vision tower by."""


class KeysValues(NamedTuple):
    """Keys and values of one layer, `b kv m e`; rows beyond those in use are room for more."""

    keys: Tensor
    values: Tensor


class Past(NamedTuple):
    """Keys and values of all layers, and how many rows of each are in use."""

    layers: tuple[KeysValues, ...]
    length: int

    def cut(self, first: int) -> "Past":
        """Return a copy whose rows from the first one on, of later tokens, pass no gradient."""

        def half(part: Tensor) -> Tensor:
            return torch.cat([part[:, :, :first], part[:, :, first:].detach()], dim=2)

        return Past(tuple(KeysValues(*map(half, layer)) for layer in self.layers), self.length)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """What a pass through the decoder yields.

    hidden: after the final norm, `b n d`; taps: what entered the layers asked for, `b n d` each; past: keys
    and values of the earlier tokens and of these.
    """

    hidden: Tensor
    taps: tuple[Tensor, ...]
    past: Past


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """What the vision tower makes of the pictures of a batch.

    tokens: `i (h w) d`, row by row over the grid of rows and columns; deep: the DeepStack features, one `i (h
    w) d` for each of the first decoder layers.
    """

    tokens: Tensor
    deep: tuple[Tensor, ...]
    rows: int
    columns: int


def build_trunk(
    config: TrunkConfig, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> nn.Module:
    """Return a Qwen3VLModel with random weights, or none on the device "meta"; there is no output layer.

    Rotary tables are made even on the device "meta", for no file holds them.
    Raises: ConfigError if the settings do not fit, or transformers is too old.
    """
    check_trunk(config)
    try:
        from transformers import AttentionInterface, Qwen3VLConfig, Qwen3VLModel
    except ImportError as err:
        raise ConfigError(
            "transformers must be 5 or newer for Exo, got one without Qwen3-VL; "
            "run: pip install -U transformers"
        ) from err
    with settings_fit("the trunk", "Qwen3-VL"):
        settings = Qwen3VLConfig(
            **{key: dict(v) if isinstance(v, Mapping) else v for key, v in config.items()}
        )
        with torch.device(device or "cpu"), _made_in(dtype):
            trunk: nn.Module = Qwen3VLModel(settings)
    AttentionInterface.register(_ATTENTION, _attend_pictures)
    tower: Any = trunk.get_submodule("visual")
    tower.config._attn_implementation = _ATTENTION
    tower.patch_embed = _PatchEmbed(tower.patch_embed.proj)
    for name, module in list(trunk.named_modules()):
        if "rotary" in name.rsplit(".", 1)[-1]:
            table: Any = module
            trunk.set_submodule(name, type(table)(table.config))
    if device is not None and torch.device(device).type != "meta":
        trunk.to(device)
    return trunk


class _PatchEmbed(nn.Module):
    """The vision tower's patch embedding, a convolution whose windows are the patches, as a matrix product.

    Backward through the convolution is half the time of a small tower's training step on a CPU.
    """

    def __init__(self, proj: nn.Module) -> None:
        super().__init__()
        self.proj = proj

    def forward(self, patches: Tensor) -> Tensor:
        """Return `n d` of patches `n k`."""
        weight = cast("Tensor", self.proj.weight)
        return functional.linear(patches.to(weight.dtype), weight.flatten(1), cast("Tensor", self.proj.bias))


@contextlib.contextmanager
def _made_in(dtype: torch.dtype | None) -> Iterator[None]:
    """Let new parameters have a dtype from the start: a large trunk never takes the memory of float32."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype or before)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _attend_pictures(
    module: nn.Module,  # noqa: ARG001 - as transformers calls it
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attention_mask: Tensor | None,
    **_: object,
) -> tuple[Tensor, None]:
    """Return the attention `b n nh e` of q, k, v `b nh n e`: on a CPU in float32, as elsewhere."""
    return rearrange(sdpa(q, k, v, attention_mask), "b n (nh e) -> b n nh e", nh=q.shape[1]), None


def look(trunk: nn.Module, pixels: Tensor, grids: Tensor) -> Picture:
    """Return the visual tokens of pictures.

    Shapes: pixels `i n k`, patches in the order of Qwen3-VL's image processor; grids `i 3`, (1, rows,
    columns) of patches, the same for all.
    Raises: ShapeError if the grids differ or do not fit the pixels.
    """
    rows, columns = int(grids[0, 1]), int(grids[0, 2])
    if bool((grids != grids[:1]).any()) or pixels.shape[:2] != (len(grids), rows * columns):
        raise ShapeError(
            f"pictures of one batch must have one grid, got pixels {tuple(pixels.shape)} and the grids "
            f"{grids.tolist()}; resize them to one size"
        )
    visual: Any = trunk.get_submodule("visual")
    flat = rearrange(pixels, "i n k -> (i n) k").to(visual.dtype)
    seen = visual(flat, grid_thw=grids)
    tokens, *deep = (
        rearrange(part, "(i n) d -> i n d", i=len(grids))
        for part in (seen.pooler_output, *seen.deepstack_features)
    )
    return Picture(tokens=tokens, deep=tuple(deep), rows=rows // MERGE, columns=columns // MERGE)


def prefix_positions(is_image: Tensor, mask: Tensor, grid: tuple[int, int] | None) -> Tensor:
    """Return the positions `3 b m` (time, row, column) of tokens; padding has 0.

    Text counts up on all three axes. A picture of grid = (rows, columns) stands still in time, spreads over
    the other two axes, and moves on by its longer side. A mask without values gives positions without values.
    Shapes: is_image, mask `b m` boolean; the mask is True on the first tokens of each sample.
    """
    if mask.is_meta:
        return mask.new_empty(3, *mask.shape, dtype=torch.long)
    positions = torch.zeros(3, *mask.shape, dtype=torch.long)
    rows, columns = grid or (0, 0)
    for sample, (image, length) in enumerate(zip(is_image.cpu(), mask.sum(dim=1).tolist(), strict=True)):
        places = torch.arange(length).expand(3, -1).clone()
        if bool(image.any()):
            start, count = int(image.int().argmax()), rows * columns
            row, column = torch.arange(rows), torch.arange(columns)
            places[0, start : start + count] = start
            places[1, start : start + count] = start + row.repeat_interleave(columns)
            places[2, start : start + count] = start + column.repeat(rows)
            places[:, start + count :] -= count - max(rows, columns)
        positions[:, sample, :length] = places
    return positions.to(mask.device)


def at_image(x: Tensor, is_image: Tensor, tokens: Tensor) -> Tensor:
    """Return x `b m d` with the visual tokens `i n d` in the places `b m` of image tokens."""
    return x.masked_scatter(is_image[..., None], tokens.to(x.dtype))


def causal_mask(mask: Tensor) -> Tensor:
    """Return which tokens each token sees, `b 1 m m`: the real ones up to itself."""
    length = mask.shape[1]
    return torch.ones(length, length, dtype=torch.bool, device=mask.device).tril() & mask[:, None, None]


def suffix_mask(keep: Tensor, length: int, iteration: int) -> Tensor:
    """Return what the tokens of an iteration see, `b 1 s m`: prefix, earlier suffixes, theirs up to each."""
    own = torch.ones(length, length, dtype=torch.bool, device=keep.device).tril()
    earlier = own.new_ones(length, iteration * length)
    suffix = torch.cat((earlier, own), dim=1).expand(keep.shape[0], 1, -1, -1)
    return torch.cat((keep[:, None, None].expand(-1, 1, length, -1), suffix), dim=-1)


def run_decoder(
    trunk: nn.Module,
    x: Tensor,
    positions: Tensor,
    *,
    keep: Tensor | None,
    past: Past | None,
    taps: Sequence[int],
    after: Callable[[int, Tensor], Tensor],
    lora: TrunkLora | None,
    runtime: Runtime,
) -> Pass:
    """Return what the decoder makes of tokens x `b n d`.

    Args:
        trunk: a Qwen3VLModel.
        x: embeddings, in the dtype of the trunk.
        positions: `3 b n`.
        keep: which of the earlier tokens and these each of them sees, broadcastable to `b 1 n m`; None = the
            ones up to itself, of these alone.
        past: of earlier tokens. Without gradients, its room takes what is new.
        taps: layers whose inputs are returned.
        after: (layer, its output) -> what enters the next layer.
        lora: low-rank changes.
        runtime: the attention product; each layer is one `trunk` block, which returns its output together
            with its `KeysValues`.
    """
    decoder: Any = trunk.get_submodule("language_model")
    turn = tuple(table[:, None] for table in decoder.rotary_emb(x, positions))  # b 1 n e
    text = decoder.config
    groups = text.num_attention_heads // text.num_key_value_heads
    tiled = None if keep is None else repeat(keep, "b one n m -> b one (g n) m", g=groups)
    seen, layers = [], []
    for index, layer in enumerate(decoder.layers):
        if index in taps:
            seen.append(x)
        changes = {} if lora is None else lora.of_layer(index)
        block = partial(
            _layer,
            layer=layer,
            turn=turn,
            keep=tiled,
            past=None if past is None else (past.layers[index], past.length),
            changes=changes,
            after=partial(after, index),
            attention=runtime.attention,
        )
        x, kept = cast("Any", runtime.run_block)("trunk", index, block, x)
        layers.append(kept)
    length = positions.shape[-1] + (0 if past is None else past.length)
    return Pass(hidden=decoder.norm(x), taps=tuple(seen), past=Past(tuple(layers), length))


def speak(
    trunk: nn.Module,
    passed: Pass,
    mask: Tensor,
    position: Tensor,
    *,
    end: int,
    most: int,
    lora: TrunkLora | None,
    runtime: Runtime,
) -> list[list[int]]:
    """Return the tokens that follow prompts, the likeliest one after another, by the trunk's own embeddings.

    Shapes: passed and mask `b m` of the prompts; position `b`, of the first new token. end: the token that
    ends an answer, which has at most so many.
    """
    embed: Any = trunk.get_submodule("language_model.embed_tokens")
    rows = torch.arange(len(mask), device=mask.device)
    last, past, keep = passed.hidden[rows, mask.sum(dim=1) - 1], passed.past, mask
    said: list[Tensor] = []
    is_open = torch.ones_like(position, dtype=torch.bool)
    while len(said) < most:
        said.append((last @ embed.weight.T).argmax(dim=-1))
        is_open &= said[-1] != end
        if not bool(is_open.any()):
            break
        keep = functional.pad(keep, (0, 1), value=True)
        following = run_decoder(
            trunk,
            embed(said[-1])[:, None],
            (position + len(said) - 1).expand(3, -1)[..., None],
            keep=keep[:, None, None],
            past=past,
            taps=(),
            after=lambda _, h: h,
            lora=lora,
            runtime=runtime,
        )
        last, past = following.hidden[:, 0], following.past
    answers = torch.stack(said, dim=1).tolist()
    return [row[: row.index(end)] if end in row else row for row in answers]


def _layer(
    x: Tensor,
    *,
    layer: Any,  # noqa: ANN401 - a class of transformers
    turn: tuple[Tensor, Tensor],
    keep: Tensor | None,
    past: tuple[KeysValues, int] | None,
    changes: Mapping[str, LowRank],
    after: Callable[[Tensor], Tensor],
    attention: AttentionFn,
) -> tuple[Tensor, KeysValues]:
    """Return the output `b n d` of a decoder layer, and the keys and values for later tokens."""
    attn = layer.self_attn
    h = layer.input_layernorm(x)
    q, k, v = (
        rearrange(
            project(getattr(attn, name), h, changes.get(name)), "b n (nh e) -> b n nh e", e=attn.head_dim
        )
        for name in ("q_proj", "k_proj", "v_proj")
    )
    q, k, v = (part.transpose(1, 2) for part in (attn.q_norm(q), attn.k_norm(k), v))  # b nh n e
    q, k = _turned(q, turn), _turned(k, turn)
    seen, kept = _joined(past, KeysValues(k, v))
    mixed = _attend(q, seen, keep, attention)
    x = x + project(attn.o_proj, mixed, changes.get("o_proj"))
    x = x + layer.mlp(layer.post_attention_layernorm(x))
    return after(x), kept


def _turned(x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    """Return x `b nh n e` with channels i and i + e/2 turned against each other."""
    cos, sin = turn
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def _joined(past: tuple[KeysValues, int] | None, new: KeysValues) -> tuple[KeysValues, KeysValues]:
    """Return the keys and values to read now, and those to hand on."""
    if past is None:
        return new, new
    old, length = past
    end = length + new.keys.shape[2]
    if torch.is_grad_enabled() or old.keys.shape[2] < end:
        joined = KeysValues(*(torch.cat((a[:, :, :length], b), dim=2) for a, b in zip(old, new, strict=True)))
        return joined, joined
    for room, part in zip(old, new, strict=True):
        room[:, :, length:end] = part
    return KeysValues(old.keys[:, :, :end], old.values[:, :, :end]), old


def _attend(q: Tensor, seen: KeysValues, keep: Tensor | None, attention: AttentionFn) -> Tensor:
    """Return the mixed values `b n (nh e)`; several queries share the keys of one head, uncopied."""
    if keep is None:
        return causal(q, seen.keys, seen.values)
    heads, count = seen.keys.shape[1], q.shape[2]
    folded = rearrange(q, "b (kv g) n e -> b kv (g n) e", kv=heads)
    mixed = attention(folded, seen.keys, seen.values, keep)
    return rearrange(mixed, "b (g n) (kv e) -> b n (kv g e)", n=count, kv=heads)
