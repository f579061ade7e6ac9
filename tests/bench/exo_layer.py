"""One layer of a large Exo at a time: a suffix with its past kept and without, a diffusion head block."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from flowcore.layers.attention import find_attention
from flowcore.layers.rope import position_rotation
from flowcore.models.exo import PRESETS, ExoConfig
from flowcore.models.exo.blocks import KeysValuesPair
from flowcore.models.exo.diffusion_head import Block, Signals
from flowcore.models.exo.grids import grid_places
from flowcore.models.exo.trunk import KeysValues, Pass, Past, build_trunk, run_decoder, suffix_mask
from flowcore.ops import DEFAULT_RUNTIME, TORCH_OPS
from tests.bench.cases import ALL_TOKENS, HEAD_BLOCK, READ, SUFFIX, Case
from tests.bench.running import Row

_OF_CONTEXT = ("cross.k.", "cross.v.")
"""Weights of a block that pass over the context alone, once for all steps."""


@dataclass(frozen=True, kw_only=True)
class Limit:
    """What a row cannot be faster than: its operations, and the weights that it reads."""

    flop: float
    weights: float
    flops: float
    bandwidth: float

    @property
    def seconds(self) -> float:
        """The longer of both takes so long."""
        return max(self.flop / self.flops, self.weights / self.bandwidth)


class Layer:
    """One decoder layer of a trunk, tokens for it, and what it keeps of those of the prompt."""

    def __init__(self, case: Case, device: str) -> None:
        config, dtype = PRESETS[case.preset], getattr(torch, case.dtype)
        torch.manual_seed(0)
        self.trunk = one_layer(config, device, dtype)
        self.length, self.suffix = case.text, config.suffix_length
        tokens = (case.batch, case.text + self.suffix, config.hidden_size)
        self.tokens = torch.randn(tokens, device=device, dtype=dtype)
        self.places = torch.arange(tokens[1], device=device).expand(3, case.batch, -1)
        self.keep = torch.ones(case.batch, case.text, dtype=torch.bool, device=device)

    def all_tokens(self) -> Tensor:
        """What the layer makes of the suffix, of prompt and suffix together."""
        return self._run(slice(None), None, None).hidden[:, self.length :]

    def with_past(self) -> Callable[[], Tensor]:
        """The same of the suffix alone; the prompt passes once, here."""
        first = self._run(slice(self.length), None, None).past
        room = (0, 0, 0, self.suffix)
        layers = tuple(KeysValues(*(functional.pad(part, room) for part in one)) for one in first.layers)
        past, keep = Past(layers, self.length), suffix_mask(self.keep, self.suffix, 0)
        return lambda: self._run(slice(self.length, None), past, keep).hidden

    def _run(self, part: slice, past: Past | None, keep: Tensor | None) -> Pass:
        return run_decoder(
            self.trunk,
            self.tokens[:, part],
            self.places[..., part],
            keep=keep,
            past=past,
            taps=(),
            after=lambda _, h: h,
            lora=None,
            runtime=DEFAULT_RUNTIME,
        )


def one_layer(config: ExoConfig, device: str, dtype: torch.dtype | None = None) -> nn.Module:
    """The trunk of a configuration whose decoder is its first layer; the rest has no values."""
    trunk = build_trunk(config.trunk, device="meta", dtype=dtype)
    decoder: Any = trunk.get_submodule("language_model")
    decoder.layers = decoder.layers[:1]
    for part in (decoder.layers, decoder.norm):
        part.to_empty(device=device)
        for weight in part.parameters():
            (nn.init.ones_ if weight.ndim == 1 else partial(nn.init.normal_, std=0.02))(weight)
    decoder.rotary_emb.to(device)
    return trunk.eval()


def head_block(case: Case, device: str) -> Callable[[], Tensor]:
    """A block of the diffusion head over all latents, with prompt and suffix as context."""
    config, dtype = PRESETS[case.preset], getattr(torch, case.dtype)
    torch.manual_seed(0)
    block = Block(config, ops=TORCH_OPS, device=device, dtype=dtype)
    random = partial(torch.randn, device=device)
    dim, head = config.diffusion_dim, config.diffusion_head_dim
    grid = tuple(-(-side // config.diffusion_patch) for side in case.shape)
    context = (case.batch, dim // head, case.text + config.suffix_length, head)
    signals = Signals(
        modulation=random(case.batch, 6, dim),
        turn=position_rotation(grid_places((grid[0], grid[1]), torch.device(device)), (head // 2,) * 2, 1e4),
        keep=torch.ones(case.batch, 1, 1, context[2], dtype=torch.bool, device=device),
        dtype=dtype,
    )
    read = KeysValuesPair(random(context, dtype=dtype), random(context, dtype=dtype))
    x = random(case.batch, grid[0] * grid[1], dim)
    return lambda: block(x, read, signals, find_attention("auto"))


def reading(case: Case, device: str) -> Callable[[], Tensor]:
    """Sums over as many bytes as the weights of a decoder layer have."""
    count = weight_bytes(replace(case, what=SUFFIX)) // 4
    values = torch.ones(count, device=device)
    return values.sum


def layer_work(case: Case, device: str) -> Callable[[], object]:
    """The call of a row."""
    kinds: dict[str, Callable[[], Callable[[], Tensor]]] = {
        SUFFIX: lambda: Layer(case, device).with_past(),
        ALL_TOKENS: lambda: Layer(case, device).all_tokens,
        HEAD_BLOCK: lambda: head_block(case, device),
        READ: lambda: reading(case, device),
    }
    with torch.inference_mode():
        call = kinds[case.what]()
    return torch.inference_mode()(call)


def weight_bytes(case: Case) -> int:
    """Bytes of the weights that a row passes through."""
    config = PRESETS[case.preset]
    if case.what == HEAD_BLOCK:
        module: nn.Module = Block(config, ops=TORCH_OPS, device="meta")
    else:
        module = one_layer(config, "meta").get_submodule("language_model.layers")
    counts = [p.numel() for name, p in module.named_parameters() if not name.startswith(_OF_CONTEXT)]
    return sum(counts) * torch.empty(0, dtype=getattr(torch, case.dtype)).element_size()


def notes(cases: Sequence[Case], rows: Sequence[Row]) -> list[str]:
    """Lines on the rows of layers beside what matrix product and memory of the same run allow.

    None unless reading was measured, too.
    """
    found = {case.what: (case, row) for case, row in zip(cases, rows, strict=True)}
    if READ not in found:
        return []
    case, read = found[READ]
    bandwidth = weight_bytes(replace(case, what=SUFFIX)) / read.seconds
    lines = [f"{read.arch} {read.size}, a layer at a time: weights are read at {bandwidth / 1e9:.3g} GB/s"]
    for what in (SUFFIX, ALL_TOKENS, HEAD_BLOCK):
        if what in found:
            lines.append(_beside_limit(*found[what], bandwidth))
    if SUFFIX in found and ALL_TOKENS in found:
        ratio = found[ALL_TOKENS][1].seconds / found[SUFFIX][1].seconds
        lines.append(f"  the past kept: {ratio:.3g} times as fast as all tokens again")
    return lines


def _beside_limit(case: Case, row: Row, bandwidth: float) -> str:
    assert row.gflops
    assert row.share
    limit = Limit(
        flop=row.gflops * row.seconds * 1e9,
        weights=weight_bytes(case),
        flops=row.gflops / row.share * 1e9,
        bandwidth=bandwidth,
    )
    return (
        f"  {row.what}: {limit.flop / 1e9:.3g} GFLOP and {limit.weights / 1e6:.3g} MB of weights, at least "
        f"{limit.seconds:.3g} s; measured {row.seconds:.3g} s, {row.seconds / limit.seconds:.2f} times"
    )
