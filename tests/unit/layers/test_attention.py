"""Attention: the formula, masks, the choice of what computes it, and flash-attn's packing.

The packing is tested with a kernel written here, which follows flash-attn's documented arguments; the package
itself only where there are a GPU and the package.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from flowcore.errors import ConfigError
from flowcore.layers import flash
from flowcore.layers.attention import ATTENTIONS, automatic, causal, find_attention, flash_attn, sdpa, widen
from flowcore.models.flux import PRESETS, Flux
from flowcore.ops import Runtime
from tests.support import BFLOAT16_LIMIT, CHAIN_LIMIT, FLOAT16_LIMIT, FORWARD_LIMIT, assert_close

MASKS = {
    "none": None,
    "padded text": torch.tensor([[True] * 7, [True] * 3 + [False] * 4])[:, None, None],
    "padding between": torch.tensor([[True, False] * 3 + [True], [False] * 6 + [True]])[:, None, None],
    "one mask for all": torch.tensor([[True] * 4 + [False] * 3])[:, None, None],
}


def heads(dtype: torch.dtype = torch.float32, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(2, 3, n, 8, generator=generator).to(device, dtype) for n in (5, 7, 7))


def plain_kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of `b n nh e`, as flash_attn_func."""
    weights = torch.einsum("bnhe,bmhe->bhnm", q, k).mul(q.shape[-1] ** -0.5).softmax(-1)
    return torch.einsum("bhnm,bmhe->bnhe", weights, v)


def packed_kernel(
    q: Tensor, k: Tensor, v: Tensor, q_ends: Tensor, k_ends: Tensor, longest_q: int, longest_k: int
) -> Tensor:
    """Attention of packed samples, as flash_attn_varlen_func: sample i has rows ends[i] to ends[i + 1]."""
    assert q_ends.dtype == k_ends.dtype == torch.int32
    assert int(q_ends[-1]) == len(q)
    assert int(k_ends[-1]) == len(k) == len(v)
    results = []
    for i in range(len(q_ends) - 1):
        queries, keys = slice(*q_ends[i : i + 2].tolist()), slice(*k_ends[i : i + 2].tolist())
        assert queries.stop - queries.start <= longest_q
        assert keys.stop - keys.start <= longest_k
        if keys.start == keys.stop:
            results.append(torch.zeros_like(q[queries]))
        else:
            results.append(plain_kernel(q[None, queries], k[None, keys], v[None, keys])[0])
    return torch.cat(results)


KERNELS = flash.Kernels(plain_kernel, packed_kernel)


@pytest.fixture
def _fresh() -> Iterator[None]:
    """Look for flash-attn anew, before and after the test."""
    flash.find_kernels.cache_clear()
    yield
    flash.find_kernels.cache_clear()


@pytest.fixture
def flash_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with flash-attn that takes every call."""
    monkeypatch.setattr(flash, "find_kernels", lambda: KERNELS)
    monkeypatch.setattr(flash, "unfit", lambda _q, _bias: None)


def test_attention_is_the_formula_with_heads_merged() -> None:
    q, k, v = heads()
    bias = torch.randn(2, 1, 5, 7)
    weights = torch.softmax(q @ k.mT / 8**0.5 + bias, dim=-1)
    assert_close(sdpa(q, k, v, bias), (weights @ v).transpose(1, 2).flatten(2), limit=FORWARD_LIMIT)


def test_masked_keys_are_as_if_they_were_not_there() -> None:
    q, k, v = heads()
    expected = sdpa(q, k[:, :, :4], v[:, :, :4])
    assert_close(sdpa(q, k, v, MASKS["one mask for all"]), expected, limit=FORWARD_LIMIT)


def test_half_precision_attention_computes_in_float32_on_the_cpu() -> None:
    half = heads(torch.bfloat16)
    expected = sdpa(*(part.float() for part in half)).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(sdpa(*half), expected)
    assert widen(half[0]).dtype == torch.float32
    assert widen(half[0].double()).dtype == torch.float64


def test_causal_attention_shares_keys_and_computes_in_float32_on_the_cpu() -> None:
    q, *rest = heads()
    k, v = (part[:, :1, :5] for part in rest)
    keep = torch.ones(5, 5, dtype=torch.bool).tril()
    expected = sdpa(q, k.expand_as(q), v.expand_as(q), keep)
    assert_close(causal(q, k, v), expected, limit=FORWARD_LIMIT)
    half = [part.bfloat16() for part in (q, k, v)]
    with torch.autocast("cpu", torch.bfloat16):
        found = causal(*half)
    assert torch.equal(found, causal(*(part.float() for part in half)).bfloat16())


@pytest.mark.parametrize("keep", MASKS.values(), ids=MASKS)
def test_packed_attention_equals_the_masked_product(keep: Tensor | None) -> None:
    parts = [part.requires_grad_() for part in heads()]
    results, gradients = [], []
    for attend in (sdpa, lambda q, k, v, keep: flash.flash(q, k, v, keep, KERNELS)):
        results.append(attend(*parts, keep))
        gradients.append(torch.autograd.grad(results[-1].square().sum(), parts))
    assert_close(results[1], results[0], limit=FORWARD_LIMIT)
    for packed, masked in zip(gradients[1], gradients[0], strict=True):
        assert_close(packed, masked, limit=CHAIN_LIMIT)


def test_hidden_keys_never_reach_the_kernel() -> None:
    seen = []

    def kernel(q: Tensor, k: Tensor, *rest: Tensor) -> Tensor:
        seen.append((len(k), rest[-1]))
        return packed_kernel(q, k, *rest)

    flash.flash(*heads(), MASKS["padded text"], flash.Kernels(plain_kernel, kernel))
    assert seen == [(7 + 3, 7)]


def test_a_sample_without_keys_gets_zeros() -> None:
    keep = torch.tensor([[True] * 7, [False] * 7])[:, None, None]
    result = flash.flash(*heads(), keep, KERNELS)
    assert result[0].abs().min() > 0
    assert not result[1].any()


def test_all_blocks_of_a_forward_share_the_packing() -> None:
    flash.pack_keys.cache_clear()
    keep = torch.ones(2, 1, 1, 7, dtype=torch.bool)
    for _ in range(3):
        flash.flash(*heads(), keep, KERNELS)
    assert flash.pack_keys.cache_info().misses == 1
    keep = torch.zeros_like(keep)  # other contents are another tensor
    assert not flash.flash(*heads(), keep, KERNELS).any()


@torch.no_grad()
def test_a_model_gives_the_same_with_packed_keys() -> None:
    model = Flux(PRESETS["points"])
    ids = [torch.arange(2 * n).reshape(1, n, 2) for n in (6, 4)]
    mask = torch.tensor([[True] * 10, [True] * 2 + [False] * 2 + [True] * 6])
    given = (torch.randn(2, 6, 2), ids[0], torch.randn(2, 4, 4), ids[1], torch.rand(2), torch.randn(2, 4))
    packed = Runtime(attention=lambda q, k, v, keep: flash.flash(q, k, v, keep, KERNELS))
    expected = model(*given, mask=mask, runtime=Runtime(attention=sdpa))
    assert_close(model(*given, mask=mask, runtime=packed), expected, limit=FORWARD_LIMIT)


@pytest.mark.usefixtures("flash_fits")
def test_flash_is_chosen_where_it_fits() -> None:
    q, k, v = heads()
    expected = flash.flash(q, k, v, MASKS["padded text"], KERNELS)
    assert torch.equal(automatic(q, k, v, MASKS["padded text"]), expected)
    assert torch.equal(find_attention("flash")(q, k, v, MASKS["padded text"]), expected)


def test_without_a_gpu_the_choice_is_pytorch() -> None:
    half = heads(torch.float16)
    assert torch.equal(find_attention("auto")(*half, None), sdpa(*half))


@pytest.mark.parametrize(
    ("changes", "bias", "reason"),
    [
        ({}, None, None),
        ({}, MASKS["padded text"], None),
        ({"device": torch.device("cpu")}, None, "it runs on CUDA devices, got cpu"),
        ({"dtype": torch.float32}, None, "it computes in bfloat16 and float16, got torch.float32"),
        ({"shape": (2, 3, 5, 264)}, None, "it takes heads of at most 256 channels, got 264"),
        (
            {},
            torch.zeros(2, 1, 1, 7),
            "it takes a boolean mask of keys, got torch.float32 of shape (2, 1, 1, 7)",
        ),
        (
            {},
            torch.ones(2, 1, 5, 7).bool(),
            "it takes a boolean mask of keys, got torch.bool of shape (2, 1, 5, 7)",
        ),
    ],
)
def test_what_fits_flash(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, object], bias: Tensor | None, reason: str | None
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (8, 0))
    query = {"device": torch.device("cuda"), "dtype": torch.float16, "shape": (2, 3, 5, 64)}
    assert flash.unfit(SimpleNamespace(**{**query, **changes}), bias) == reason


def test_an_old_gpu_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (7, 5))
    query = SimpleNamespace(device=torch.device("cuda"), dtype=torch.float16, shape=(2, 3, 5, 64))
    assert flash.unfit(query, None) == "it needs compute capability 8.0, got (7, 5)"


@pytest.mark.usefixtures("_fresh")
def test_flash_without_the_package_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    with pytest.raises(ConfigError) as caught:
        find_attention("flash")
    assert str(caught.value) == (
        "attention must be one that is here, got flash: the package flash-attn is not installed; "
        "pip install flash-attn, or use auto"
    )
    assert torch.equal(automatic(*heads()), sdpa(*heads()))


@pytest.mark.usefixtures("_fresh")
def test_a_package_that_does_not_load_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "flash_attn.py").write_text("raise ImportError('undefined symbol: _ZN3c10\\nin a library')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "flash_attn", raising=False)
    with pytest.raises(ConfigError, match=r"does not load \(undefined symbol: _ZN3c10\); pip install"):
        find_attention("flash")


@pytest.mark.parametrize("kernels", [KERNELS, "the package flash-attn is not installed"])
def test_flash_by_name_on_a_cpu_is_one_line(
    monkeypatch: pytest.MonkeyPatch, kernels: flash.Kernels | str
) -> None:
    monkeypatch.setattr(flash, "find_kernels", lambda: kernels)
    with pytest.raises(
        ConfigError, match=r"^attention flash must have what it needs: .*; use attention auto"
    ):
        flash_attn(*heads())


def test_an_unknown_name_is_one_line() -> None:
    with pytest.raises(ConfigError, match="attention must be one of auto, sdpa, flash, got 'xformers'"):
        find_attention("xformers")


@pytest.mark.gpu
@pytest.mark.parametrize("name", [name for name in ATTENTIONS if name != "sdpa"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("keep", MASKS.values(), ids=MASKS)
def test_attention_on_a_gpu_equals_the_product_in_float32(
    name: str, dtype: torch.dtype, keep: Tensor | None
) -> None:
    if name == "flash":
        pytest.importorskip("flash_attn", reason="the package flash-attn is not installed")
    half = heads(dtype, "cuda")
    on_gpu = None if keep is None else keep.cuda()
    limit = BFLOAT16_LIMIT if dtype == torch.bfloat16 else FLOAT16_LIMIT
    expected = sdpa(*(part.float() for part in half), on_gpu)
    assert_close(find_attention(name)(*half, on_gpu).float(), expected, limit=limit)
