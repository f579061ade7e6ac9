"""Golden cases of XUT's single modules and of its backbone alone."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import NamedTuple, TypeVar

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from flowcore.layers.modulation import Modulation
from flowcore.layers.patch import unpatchify
from flowcore.layers.rope import axial_angles, rotate_pairs
from flowcore.models.xut import XUTConfig
from flowcore.models.xut.backbone import Backbone
from flowcore.models.xut.blocks import (
    AdaLN,
    AxialRoPE,
    Block,
    CrossAttention,
    DyT,
    PatchEmbed,
    RMSNorm,
    SelfAttention,
    SharedModulation,
    Signals,
    SwiGLU,
    TimestepEmbedding,
    UnPatch,
)
from flowcore.models.xut.positions import axial_positions, cropped_positions, pool_positions
from flowcore.ops import DEFAULT_RUNTIME, TORCH_OPS
from tests.golden.compare import Case, Metadata, Options, Tensors, part, stored_config

SDPA = DEFAULT_RUNTIME.attention
ModuleT = TypeVar("ModuleT", bound=nn.Module)


class Setup(NamedTuple):
    """What one output of a single module is computed from; result: its name behind the module's."""

    config: XUTConfig
    weights: Tensors
    given: Tensors
    result: str
    tensors: Tensors


def cases(tensors: Tensors, metadata: Metadata, _options: Options) -> Iterator[Case]:
    """Every output of a `modules` file, in float32 on the CPU."""
    settings = stored_config(metadata)
    settings["input_dim"] = settings.pop("in_channels")
    config = XUTConfig(**settings)
    for name in sorted(part(tensors, "output.")):
        module, _, result = name.partition(".")
        with torch.no_grad():
            if module in GRIDS:
                actual = GRIDS[module](result)
            else:
                weights, given = part(tensors, f"weight.{module}."), part(tensors, f"input.{module}.")
                actual = MODULES[module](Setup(config, weights, given, result, tensors))
        yield Case(f"output.{name}", actual, tensors[f"output.{name}"])


def grid(name: str, **options: object) -> Tensor:
    """The positions of a grid called `3x5`."""
    height, width = (int(size) for size in name.split("x"))
    return axial_positions(height, width, **options)


GRIDS: Mapping[str, Callable[[str], Tensor]] = {
    "axial_pos": grid,
    "axial_pos_align_corners": partial(grid, align_corners=True),
    "axial_pos_par2": partial(grid, pixel_aspect=2.0),
    "cropped_pos": lambda name: cropped_positions(*(int(size) for size in name.split("_"))),
}


def filled(module: ModuleT, weights: Tensors) -> ModuleT:
    """The module with the file's weights."""
    module.load_state_dict(dict(weights), strict=True, assign=True)
    return module


def head_bias(mask: Tensor | None) -> Tensor | None:
    """An additive mask `q k` or `b q k` with an axis for the heads."""
    return mask if mask is None or mask.ndim == 2 else rearrange(mask, "b q k -> b 1 q k")


def shared_triple(given: Tensors, prefix: str) -> Modulation:
    """A stored triple with the offsets that the project keeps it with."""
    scale, shift, gate = (given[f"{prefix}{name}"] for name in ("scale", "shift", "gate"))
    return Modulation(scale=scale + 1, shift=shift, gate=gate + 1)


def shared_triples(given: Tensors) -> SharedModulation:
    """The stored triples of the three kinds of sub-layers."""
    return SharedModulation(*(shared_triple(given, f"shared.{kind}.") for kind in ("attn", "xattn", "ffw")))


def rope(case: Setup) -> Tensor:
    module = filled(AxialRoPE(case.config), case.weights)
    if case.result == "y":
        return rotate_pairs(case.given["x"], module(case.given["pos"]))
    angles = axial_angles(case.given["pos"], module.freqs.exp())
    return repeat(angles, "b nh n q -> b nh n (q two)", two=2)


def time_emb(case: Setup) -> Tensor:
    module = filled(TimestepEmbedding(case.config.dim, ops=TORCH_OPS), case.weights)
    return module(case.given["t"].flatten())


def patch(case: Setup) -> Tensor:
    if case.result == "y":
        return filled(PatchEmbed(case.config, ops=TORCH_OPS), case.weights)(case.given["x"])
    rows, columns = (side // case.config.patch_size for side in case.given["x"].shape[-2:])
    return pool_positions(case.given["pos_map"], rows, columns, case.config.patch_size)


def unpatch(case: Setup) -> Tensor:
    side = case.config.patch_size
    patches = filled(UnPatch(case.config, ops=TORCH_OPS), case.weights)(case.given["x"])
    height, width = case.tensors["output.unpatch.y"].shape[-2:]  # tokens alone do not tell the grid
    return unpatchify(patches, height // side, width // side, side)


def mlp(case: Setup) -> Tensor:
    return filled(SwiGLU(case.config, ops=TORCH_OPS), case.weights)(case.given["x"])


def rmsnorm(case: Setup) -> Tensor:
    return filled(RMSNorm(case.config.dim), case.weights)(case.given["x"])


def dyt(case: Setup) -> Tensor:
    return filled(DyT(case.config.dim), case.weights)(case.given["x"])


def adaln(case: Setup) -> Tensor:
    module = filled(AdaLN(replace(case.config, shared_adaln=False), ops=TORCH_OPS), case.weights)
    return module(case.given["x"], case.given["cond"], None)[0 if case.result == "y" else 1]


def adaln_shared(case: Setup) -> Tensor:
    module = filled(AdaLN(case.config, ops=TORCH_OPS), case.weights)
    triple = shared_triple(case.given, "")
    return module(case.given["x"], triple.gate, triple)[0 if case.result == "y" else 1]


def self_attn(case: Setup) -> Tensor:
    module = filled(SelfAttention(case.config, ops=TORCH_OPS), case.weights)
    positions = None if case.result == "y_nopos" else case.given["pos"]
    mask = case.given.get(case.result.removeprefix("y_"))
    return module(case.given["x"], positions, head_bias(mask), SDPA)


def cross_attn(case: Setup) -> Tensor:
    given = case.given
    module = filled(CrossAttention(case.config, given["ctx"].shape[-1], ops=TORCH_OPS), case.weights)
    context_positions = given["ctx_pos"] if case.result == "y" else None  # rotated keys in `y` alone
    mask = given.get(case.result.removeprefix("y_"))
    return module(given["x"], given["ctx"], given["pos"], context_positions, head_bias(mask), SDPA)


def block_ctx(case: Setup) -> Tensor:
    """A block with its own modulation that reads text; `y_masked` takes the masks of the two attentions."""
    config = replace(case.config, shared_adaln=False)
    module = filled(Block(config, case.given["ctx"].shape[-1], ops=TORCH_OPS), case.weights)
    signals = Signals(
        dtype=torch.float32,
        condition=case.given["cond"],
        positions=case.given["pos"],
        context=case.given["ctx"],
    )
    if case.result == "y_masked":
        own, text = case.tensors["input.self_attn.mask3d"], case.tensors["input.cross_attn.mask"]
        signals = replace(signals, bias=head_bias(own), context_bias=head_bias(text))
    return module(case.given["x"], signals, SDPA)


def block_skip(case: Setup) -> Tensor:
    module = filled(Block(case.config, case.config.dim, ops=TORCH_OPS), case.weights)
    shared = shared_triples(case.given)
    signals = Signals(
        dtype=torch.float32, condition=shared.attn.gate, shared=shared, positions=case.given["pos"]
    )
    return module(case.given["x"], signals, SDPA, case.given["enc"])


MODULES: Mapping[str, Callable[[Setup], Tensor]] = {
    "rope": rope,
    "time_emb": time_emb,
    "patch": patch,
    "unpatch": unpatch,
    "mlp": mlp,
    "rmsnorm": rmsnorm,
    "dyt": dyt,
    "adaln": adaln,
    "adaln_shared": adaln_shared,
    "self_attn": self_attn,
    "cross_attn": cross_attn,
    "block_ctx": block_ctx,
    "block_skip": block_skip,
}


def backbone_cases(tensors: Tensors, metadata: Metadata, _options: Options) -> Iterator[Case]:
    """The backbone alone: the result without masks, with one, with both, and the encoder's output."""
    settings = stored_config(metadata)
    is_shared = settings.pop("use_shared_adaln")
    for name in ("pos_dim", "use_adaln"):
        settings.pop(name, None)
    config = XUTConfig.from_dict(
        {**settings, "concat_ctx": settings.get("ctx_dim") is None, "shared_adaln": is_shared}
    )
    backbone = filled(Backbone(config, ops=TORCH_OPS), part(tensors, "weight."))
    given = part(tensors, "input.")
    plain = Signals(
        dtype=torch.float32,
        condition=given["cond"],
        shared=shared_triples(given) if is_shared else None,
        positions=given.get("pos_map"),
        context=given.get("ctx"),
    )
    own, text = head_bias(given.get("x_mask")), head_bias(given.get("ctx_mask"))
    masks = {"y": (None, None), "y_xmask": (own, None), "y_ctxmask": (None, text), "y_bothmask": (own, text)}
    for name, expected in sorted(part(tensors, "output.").items()):
        bias, context_bias = masks.get(name, (None, None))
        signals = replace(plain, bias=bias, context_bias=context_bias)
        with torch.no_grad():
            result, encoded = backbone(given["x"], signals, DEFAULT_RUNTIME)
        yield Case(f"output.{name}", encoded if name == "enc_out" else result, expected)
