"""A step of Exo without any cache: what the cached one is measured by, in results and in time."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from flowcore.models.exo import PRESETS, Exo, StepResult
from flowcore.models.exo.trunk import at_image, look, prefix_positions, run_decoder
from flowcore.models.exo.trunk_config import TRUNKS
from flowcore.ops import DEFAULT_RUNTIME


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """What `Exo.encode` takes."""

    token_ids: Tensor
    token_mask: Tensor | None = None
    pixels: Tensor | None = None
    grids: Tensor | None = None


def random_exo(preset: str = "tiny", seed: int = 0, **changes: object) -> Exo:
    """A model whose every parameter is random and whose gates are open."""
    torch.manual_seed(seed)
    model = Exo(replace(PRESETS[preset], **changes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("gate"):
                parameter.fill_(0.7)
            elif parameter.ndim > 1:
                nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
            else:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def recomputed_step(model: Exo, z: Tensor, t: Tensor, prompt: Prompt, *, iterations: int = 4) -> StepResult:
    """What `Exo.step` returns, with the whole sequence through the trunk in every iteration."""
    config, trunk = model.config, model.trunk
    ids = prompt.token_ids
    mask = torch.ones_like(ids, dtype=torch.bool) if prompt.token_mask is None else prompt.token_mask
    is_image = (ids == config.trunk["image_token_id"]) & mask
    embedded, grid, deep = trunk.language_model.embed_tokens(ids), None, []
    features, estimate = None, None
    if prompt.pixels is not None:
        picture = look(trunk, prompt.pixels, prompt.grids)
        grid = (picture.rows, picture.columns)
        embedded = at_image(embedded, is_image, picture.tokens)
        deep = [at_image(torch.zeros_like(embedded), is_image, part) for part in picture.deep]
        features = model.projector(picture.tokens, grid, z.shape[-2:])
        estimate = model.projector.latents(features)
    positions = prefix_positions(is_image, mask, grid)
    length, count = config.suffix_length, ids.shape[1]
    base, edits = model.memory.base(z, t, features, estimate), None
    memories, suffixes, done = [], [], []
    for k in range(iterations):
        memories.append(model.memory(base, edits, z.dtype))
        suffixes.append(model.tokens(model.tokens.timestep(t, z.dtype), k))
        total = count + (k + 1) * length
        places = positions.amax(dim=(0, 2))[:, None] + 1 + torch.arange(total - count)
        keep = torch.cat((mask, mask.new_ones(len(ids), total - count)), dim=1)[:, None, None]
        passed = run_decoder(
            trunk,
            torch.cat((embedded, *suffixes), dim=1),
            torch.cat((positions, places.expand(3, -1, -1)), dim=2),
            keep=keep & torch.ones(total, total, dtype=torch.bool).tril(),
            past=None,
            taps=config.context_layers,
            after=lambda layer, h, memories=tuple(memories): _after(model, layer, h, count, deep, memories),
            lora=model.lora,
            runtime=DEFAULT_RUNTIME,
        )
        hidden = passed.hidden[:, -length:]
        done.append(model.edit_head(memories[-1], hidden, DEFAULT_RUNTIME))
        edits = done[-1].write(edits)
    context = [torch.cat((tap[:, :count], tap[:, -length:]), dim=1) for tap in passed.taps]
    velocity = model.diffusion_head(
        z,
        t,
        hidden[:, 1],
        edits=edits,
        features=features,
        reads=model.diffusion_head.read(context, z.dtype),
        keep=torch.cat((mask, mask.new_ones(len(ids), length)), dim=1),
        runtime=DEFAULT_RUNTIME,
    )
    return StepResult(velocity=velocity, noised=z, time=t, edits=edits, iterations=tuple(done))


def _after(
    model: Exo, layer: int, h: Tensor, count: int, deep: Sequence[Tensor], memories: Sequence[Tensor]
) -> Tensor:
    """The states behind a layer: DeepStack on the prompt, adapters on each suffix with its own memory."""
    prefix, suffix = h[:, :count], h[:, count:]
    if layer < len(deep):
        prefix = prefix + deep[layer]
    if layer in model.config.adapter_layers:
        adapter = model.adapters[str(layer)]
        parts = zip(suffix.chunk(len(memories), dim=1), memories, strict=True)
        looked = [
            adapter(part, adapter.attn.read(memory), DEFAULT_RUNTIME.attention) for part, memory in parts
        ]
        suffix = torch.cat(looked, dim=1)
    return torch.cat((prefix, suffix), dim=1)


def sized_trunk(hidden: int, layers: int, mlp: int) -> dict[str, object]:
    """The settings of a trunk with heads of 64 channels, and no more of a vision tower than the tiny one."""
    tiny = TRUNKS["tiny"]
    heads = {"num_attention_heads": hidden // 64, "num_key_value_heads": hidden // 64, "head_dim": 64}
    text = {**TRUNKS["demo"]["text_config"], **heads, "hidden_size": hidden}
    text |= {"num_hidden_layers": layers, "intermediate_size": mlp}
    return {
        **tiny,
        "text_config": text,
        "vision_config": {**tiny["vision_config"], "out_hidden_size": hidden},
    }
