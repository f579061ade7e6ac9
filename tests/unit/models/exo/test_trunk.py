"""Passes through the trunk against transformers' own forward; untouched trunk, LoRA as peft has it."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flowcore.errors import CheckpointError, ShapeError
from flowcore.models.exo import PRESETS, Exo
from flowcore.models.exo.lora import add_merged, from_peft, to_peft
from flowcore.models.exo.trunk import build_trunk, look, prefix_positions
from flowcore.models.exo.trunk_config import TRUNKS
from flowcore.text.qwen3_vl import ByteTokenizer, encode_prompts
from tests.exo_recomputed import random_exo
from tests.support import FORWARD_LIMIT, assert_close

SIZE = (4, 4)


def conditions(has_picture: bool = True) -> dict[str, torch.Tensor]:
    """Token ids of different lengths, and pictures of 3 x 2 visual tokens."""
    images = torch.rand(2, 3, 96, 64, generator=torch.Generator().manual_seed(0)) if has_picture else None
    found = encode_prompts(ByteTokenizer(), ["a", "two words"], images)
    assert found.context is not None
    return {"token_ids": found.context[..., 0], "token_mask": found.context_mask, **found.extras}


def stock(model: Exo, given: dict[str, torch.Tensor]) -> tuple[torch.Tensor, object, torch.Tensor]:
    """Final states, cache and positions of the library's forward."""
    ids, mask = given["token_ids"], given["token_mask"]
    is_image = (ids == model.config.trunk["image_token_id"]).int()
    pixels = given.get("pixels")
    found, _ = model.trunk.get_rope_index(
        ids, is_image, image_grid_thw=given.get("grids"), attention_mask=mask.long()
    )
    result = model.trunk(
        input_ids=ids,
        attention_mask=mask.long(),
        position_ids=found,
        pixel_values=None if pixels is None else pixels.flatten(0, 1),
        image_grid_thw=given.get("grids"),
        use_cache=True,
    )
    return result.last_hidden_state, result, found


@pytest.mark.parametrize("has_picture", [True, False])
def test_prefix_equals_the_librarys_forward(has_picture: bool) -> None:
    model, given = random_exo(), conditions(has_picture)
    mask = given["token_mask"]
    taps: list[torch.Tensor] = []
    layers = [model.trunk.language_model.layers[i] for i in model.config.context_layers]
    with torch.no_grad():
        own = model.encode(**given, size=SIZE)
        hooks = [
            layer.register_forward_pre_hook(lambda _, inputs: taps.append(inputs[0])) for layer in layers
        ]
        _, result, positions = stock(model, given)
        for hook in hooks:
            hook.remove()
        reads = model.diffusion_head.read(taps, torch.float32)
    cache = getattr(result, "cache", None) or result.past_key_values
    for index, kept in enumerate(own.past.layers):
        library = cache.layers[index]
        for one, other in ((kept.keys, library.keys), (kept.values, library.values)):
            rows = one[:, :, : own.past.length].transpose(1, 2)[mask]
            assert_close(rows, other.transpose(1, 2)[mask], limit=FORWARD_LIMIT)
    for one, other in zip(own.reads, reads, strict=True):
        assert_close(one.keys.transpose(1, 2)[mask], other.keys.transpose(1, 2)[mask], limit=FORWARD_LIMIT)
    expected = [int(positions[:, i, mask[i]].max()) + 1 for i in range(2)]
    assert own.first_position.tolist() == expected


def test_a_trunk_is_made_in_its_dtype_from_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[torch.dtype] = []
    empty = torch.empty

    def watched(*args: Any, **kwargs: Any) -> Tensor:
        result = empty(*args, **kwargs)
        made.append(result.dtype)
        return result

    monkeypatch.setattr(torch, "empty", watched)
    trunk = build_trunk(TRUNKS["tiny"], dtype=torch.bfloat16)
    assert made
    assert torch.float32 not in made
    assert {p.dtype for p in trunk.parameters()} == {torch.bfloat16}
    assert torch.get_default_dtype() == torch.float32


def test_positions_equal_the_librarys() -> None:
    given, trunk = conditions(), build_trunk(TRUNKS["tiny"])
    ids, mask = given["token_ids"], given["token_mask"]
    is_image = (ids == TRUNKS["tiny"]["image_token_id"]) & mask
    found, _ = trunk.get_rope_index(
        ids, is_image.int(), image_grid_thw=given["grids"], attention_mask=mask.long()
    )
    assert torch.equal(prefix_positions(is_image, mask, (3, 2)) * mask, found * mask)


def test_untrained_adapters_and_edits_change_nothing() -> None:
    torch.manual_seed(0)
    model, given = Exo(PRESETS["tiny"]).eval(), conditions()
    z, t = torch.randn(2, 16, *SIZE), torch.tensor([0.3, 0.9])
    seen: list[torch.Tensor] = []
    hook = model.trunk.language_model.norm.register_forward_hook(lambda *args: seen.append(args[2]))
    with torch.no_grad():
        prefix = model.encode(**given, size=SIZE)
        one = model.step(z, t, prefix, iterations=2)
        two = model.step(z + 1, t, prefix, iterations=2)
    hook.remove()
    assert all(map(torch.equal, seen[1:3], seen[3:5]))  # latents do not reach the trunk's states
    assert not one.velocity.any()
    assert not two.edits.any()
    assert one.mask.mean() < 0.3  # mostly off


def test_gates_and_edits_reach_the_velocity() -> None:
    model, given = random_exo(), conditions()
    z, t = torch.randn(2, 16, *SIZE, generator=torch.Generator().manual_seed(0)), torch.tensor([0.3, 0.9])
    with torch.no_grad():
        prefix = model.encode(**given, size=SIZE)
        base = model.step(z, t, prefix)
        for adapter in model.adapters.values():
            adapter.gate.zero_()
        closed = model.step(z, t, prefix)
        model.edit_head.delta2.weight.zero_()
        model.edit_head.delta2.bias.zero_()
        still = model.step(z, t, prefix)
    assert not torch.allclose(base.velocity, closed.velocity, atol=1e-3)
    assert not torch.allclose(closed.velocity, still.velocity, atol=1e-3)
    assert not still.edits.any()


def test_one_grid_for_all_pictures() -> None:
    trunk = build_trunk(TRUNKS["tiny"])
    grids = torch.tensor([[1, 6, 4], [1, 4, 6]])
    with pytest.raises(ShapeError, match="must have one grid"):
        look(trunk, torch.zeros(2, 24, 1536), grids)


def test_the_towers_attention_is_the_librarys_but_for_half_precision() -> None:
    trunk = build_trunk(TRUNKS["demo"]).eval()
    given = conditions()
    pixels, grids = given["pixels"], given["grids"]
    seen: dict[str, torch.Tensor] = {}
    with torch.no_grad():
        for name in ("flowcore", "sdpa"):
            trunk.visual.config._attn_implementation = name
            seen[name] = look(trunk, pixels, grids).tokens
            with torch.autocast("cpu", torch.bfloat16):
                seen[f"{name} half"] = look(trunk, pixels, grids).tokens
    assert_close(seen["flowcore"], seen["sdpa"], limit=FORWARD_LIMIT)
    errors = [(seen[f"{name} half"].float() - seen["sdpa"]).square().mean() for name in ("flowcore", "sdpa")]
    assert 0 < errors[0] < errors[1]


def test_the_towers_patch_embedding_is_the_librarys() -> None:
    library = pytest.importorskip("transformers.models.qwen3_vl.modeling_qwen3_vl")
    tower = build_trunk(TRUNKS["demo-fine"]).visual
    stock = library.Qwen3VLVisionPatchEmbed(tower.config)
    stock.load_state_dict(tower.patch_embed.state_dict())
    patches = torch.randn(24, stock.proj.weight[0].numel())
    with torch.no_grad():
        assert_close(tower.patch_embed(patches), stock(patches), limit=FORWARD_LIMIT)


def test_moved_picture_moves_features() -> None:
    """32 pixels to the right are one visual token: the projector's features follow, away from the border."""
    torch.manual_seed(0)
    projector = random_exo().projector
    tokens = torch.randn(1, 4, 10, 64)
    with torch.no_grad():
        here, there = (
            projector(part.flatten(1, 2), (4, 10), (16, 40)) for part in (tokens, tokens.roll(1, dims=2))
        )
    assert_close(there[..., 16:28], here[..., 12:24], limit=FORWARD_LIMIT)


def with_peft(model: Exo) -> nn.Module:
    """Change the trunk by peft as the model's own LoRA does."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=4,
        lora_alpha=model.config.lora_alpha,
        target_modules=r"language_model\.layers\.\d+\.self_attn\.[qkvo]_proj",
    )
    return peft.get_peft_model(model.trunk, config)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_lora_equals_pefts() -> None:
    model, given = random_exo(lora_rank=4), conditions()
    z, t = torch.randn(2, 16, *SIZE), torch.tensor([0.3, 0.9])
    with torch.no_grad():
        own = model.step(z, t, model.encode(**given, size=SIZE)).velocity
        tensors = model.lora.state_dict()
        model.lora = None
        without = model.step(z, t, model.encode(**given, size=SIZE)).velocity
        adapter = with_peft(model)
        state = {
            name.replace(".lora_A.", ".lora_A.default.").replace(".lora_B.", ".lora_B.default."): tensor
            for name, tensor in to_peft(tensors).items()
        }
        report = adapter.load_state_dict(state, strict=False)
        assert not report.unexpected_keys
        by_peft = model.step(z, t, model.encode(**given, size=SIZE)).velocity
    assert_close(by_peft, own, limit=FORWARD_LIMIT)
    assert not torch.allclose(without, own, atol=1e-3)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_adapter_saved_by_peft_is_read() -> None:
    peft, model = pytest.importorskip("peft"), random_exo(lora_rank=4)
    adapter = with_peft(model)
    tensors = from_peft(peft.get_peft_model_state_dict(adapter), source="adapter")
    model.lora.load_state_dict(tensors, strict=True)
    assert to_peft(model.lora.state_dict()).keys() == peft.get_peft_model_state_dict(adapter).keys()
    name = "base_model.model.language_model.layers.0.mlp.up_proj.lora_A.weight"
    with pytest.raises(CheckpointError, match="of the trunk's decoder alone, got base_model"):
        from_peft({name: torch.zeros(1)}, source="adapter")


def test_merged_lora_equals_unmerged() -> None:
    model, given = random_exo(lora_rank=4), conditions()
    z, t = torch.randn(2, 16, *SIZE), torch.tensor([0.3, 0.9])
    with torch.no_grad():
        own = model.step(z, t, model.encode(**given, size=SIZE)).velocity
        for index, layer in enumerate(model.trunk.language_model.layers):
            for name, change in model.lora.of_layer(index).items():
                add_merged(getattr(layer.self_attn, name), change)
        model.lora = None
        merged = model.step(z, t, model.encode(**given, size=SIZE)).velocity
    assert_close(merged, own, limit=FORWARD_LIMIT)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    model, given = random_exo(), conditions()
    z, t = torch.randn(2, 16, *SIZE, generator=torch.Generator().manual_seed(0)), torch.tensor([0.3, 0.9])
    with torch.no_grad():
        full = model.step(z, t, model.encode(**given, size=SIZE), iterations=1)
        half = model.to(dtype)
        given["pixels"] = given["pixels"].to(dtype)
        found = half.step(z.to(dtype), t, half.encode(**given, size=SIZE), iterations=1)
    assert found.velocity.dtype == dtype
    assert_close(found.mask, full.mask, limit=0.3)
