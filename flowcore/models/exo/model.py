"""Exo: a multimodal language model that looks at noised latents, refines, and marks what it edits.

The prompt and its picture pass through the trunk once. Every step of sampling then appends suffixes, one an
iteration: they look at the latents, a head marks cells and writes into them, the next iteration sees what
was written; at the end the diffusion head gives the velocity. Time runs from 1 (noise) to 0.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...errors import CheckpointError, ConfigError
from ...ops import DEFAULT_RUNTIME, TORCH_OPS, Ops, Runtime
from .blocks import KeysValuesPair
from .config import MAX_ITERATIONS, ExoConfig
from .diffusion_head import DiffusionHead
from .edit_head import Edit, EditHead
from .inputs import check_latents, check_prompt
from .lora import TrunkLora
from .memory import Adapter, Memory, Projector, SuffixTokens
from .reading import Reading, read_on, shared_start
from .states import PrefixState, StepResult
from .trunk import (
    KeysValues,
    Pass,
    Past,
    at_image,
    build_trunk,
    causal_mask,
    look,
    prefix_positions,
    run_decoder,
    speak,
    suffix_mask,
)

_TRUNK = "trunk."


class Refinement(NamedTuple):
    """An iteration: the trunk's pass over its suffix, its edit, and the edits so far, `b (hm wm) k`."""

    passed: Pass
    edit: Edit
    edits: Tensor


class Exo(nn.Module):
    """A Qwen3-VL trunk with adapters, a projector, a diffusion head and an edit head.

    Parameters have the names of Exo's files. The trunk is the model's own (`config.embeds_trunk`), or is
    attached: then its weights belong to files of their own.
    Raises: ConfigError if the trunk's settings do not fit transformers' Qwen3-VL.
    """

    def __init__(
        self,
        config: ExoConfig,
        *,
        ops: Ops = TORCH_OPS,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        self.adapters = nn.ModuleDict(
            {str(layer): Adapter(config, ops=ops, **where) for layer in config.adapter_layers}
        )
        self.tokens = SuffixTokens(config, ops=ops, **where)
        self.projector = Projector(config, ops=ops, **where)
        self.memory = Memory(config, ops=ops, **where)
        self.diffusion_head = DiffusionHead(config, ops=ops, **where)
        self.edit_head = EditHead(config, ops=ops, **where)
        self.lora = TrunkLora(config, ops=ops, **where) if config.lora_rank else None
        self.trunk: nn.Module | None = None
        if config.embeds_trunk:
            self.trunk = build_trunk(config.trunk, device=device, dtype=dtype)
            self.scale_tokens()

    def attach(self, trunk: nn.Module) -> None:
        """Take a Qwen3VLModel as trunk; it takes no gradient.

        Raises: CheckpointError if it has another width or depth than the one this model was made for.
        """
        text = cast("Any", trunk.get_submodule("language_model")).config
        found = (text.hidden_size, text.num_hidden_layers)
        if found != (self.config.hidden_size, self.config.num_layers):
            raise CheckpointError(
                f"the trunk must have width {self.config.hidden_size} and {self.config.num_layers} layers, "
                f"as the one this Exo file was made for, got {found[0]} and {found[1]}; give that trunk"
            )
        self.trunk = trunk.requires_grad_(self.config.embeds_trunk)

    def scale_tokens(self) -> None:
        """Give new suffix tokens the size of the trunk's embeddings: for a model that starts untrained."""
        table = self._trunk().get_submodule("language_model.embed_tokens").weight
        with torch.no_grad():
            self.tokens.norm.weight.fill_(1.0).mul_(cast("Tensor", table).float().square().mean().sqrt())

    def own_state(self) -> dict[str, Tensor]:
        """Return the tensors of an Exo file: all, but for those of an attached trunk."""
        state: Mapping[str, Tensor] = self.state_dict()
        keeps = self.config.embeds_trunk
        return {name: tensor for name, tensor in state.items() if keeps or not name.startswith(_TRUNK)}

    def encode(
        self,
        token_ids: Tensor,
        token_mask: Tensor | None = None,
        *,
        size: tuple[int, int],
        pixels: Tensor | None = None,
        grids: Tensor | None = None,
        dtype: torch.dtype | None = None,
        runtime: Runtime = DEFAULT_RUNTIME,
    ) -> PrefixState:
        """Return what prompts and pictures amount to, for all steps and iterations.

        Args:
            token_ids: `b m`; a prompt with a picture has an image token for each of its visual tokens.
            token_mask: `b m`, True on real tokens, which come first; None = all.
            size: rows and columns of the latents.
            pixels: `i n k`, a picture for each prompt that has image tokens, in their order.
            grids: `i 3`, (1, rows, columns) of patches.
            dtype: of the latents to come, which all but the trunk computes in; None = the trunk's.
            runtime: the attention product; layers are of the kind `trunk`.

        Raises: ShapeError if shapes do not fit each other; ConfigError without a trunk.
        """
        mask = (torch.ones_like(token_ids) if token_mask is None else token_mask).bool()
        passed, positions, picture = self.read(token_ids, mask, pixels=pixels, grids=grids, runtime=runtime)
        dtype = dtype or passed.hidden.dtype
        features, estimate = None, None
        if picture is not None:
            has_image = self._is_image(token_ids, mask).any(dim=1)
            seen = self.projector(picture.tokens.to(dtype), (picture.rows, picture.columns), size)
            features = _in_rows(seen, has_image)
            if self.config.memory_compares:
                estimate = _in_rows(self.projector.latents(seen), has_image)
        return PrefixState(
            past=self._with_room(passed.past),
            reads=self.diffusion_head.read(passed.taps, dtype),
            keep=mask,
            first_position=positions.amax(dim=(0, 2)) + 1,
            features=features,
            estimate=estimate,
            size=size,
        )

    def read(
        self,
        token_ids: Tensor,
        mask: Tensor,
        *,
        pixels: Tensor | None = None,
        grids: Tensor | None = None,
        runtime: Runtime = DEFAULT_RUNTIME,
    ) -> Reading:
        """Return what the trunk makes of texts and pictures.

        Arguments are those of `encode`; the mask is boolean. Raises: as `encode`.
        """
        trunk, is_image = self._trunk(), self._is_image(token_ids, mask)
        check_prompt(token_ids, mask, is_image, pixels, grids)
        taps = self.config.context_layers
        if shared := shared_start(token_ids, mask, is_image, pixels):
            assert pixels is not None
            assert grids is not None
            start = self.read(
                token_ids[:1, :shared], mask[:1, :shared], pixels=pixels[:1], grids=grids[:1], runtime=runtime
            )
            assert start.picture is not None
            positions = prefix_positions(is_image, mask, (start.picture.rows, start.picture.columns))
            return read_on(
                trunk, start, token_ids, mask, positions, taps=taps, lora=self.lora, runtime=runtime
            )
        picture = None if pixels is None or grids is None else look(trunk, pixels, grids)
        positions = prefix_positions(
            is_image, mask, None if picture is None else (picture.rows, picture.columns)
        )
        x: Tensor = trunk.get_submodule("language_model.embed_tokens")(token_ids)
        deep: tuple[Tensor, ...] = ()
        if picture is not None:
            x = at_image(x, is_image, picture.tokens)
            deep = tuple(at_image(torch.zeros_like(x), is_image, part) for part in picture.deep)
        passed = run_decoder(
            trunk,
            x,
            positions,
            keep=None if not mask.is_meta and bool(mask.all()) else causal_mask(mask),
            past=None,
            taps=taps,
            after=lambda layer, h: h + deep[layer] if layer < len(deep) else h,
            lora=self.lora,
            runtime=runtime,
        )
        return Reading(passed, positions, picture)

    @torch.no_grad()
    def answer(
        self,
        token_ids: Tensor,
        mask: Tensor,
        *,
        end: int,
        most: int,
        pixels: Tensor | None = None,
        grids: Tensor | None = None,
        runtime: Runtime = DEFAULT_RUNTIME,
    ) -> list[list[int]]:
        """Return the tokens that follow each prompt, the likeliest one after another, up to the token `end`.

        most: tokens of an answer that does not end. The rest is as in `read`, also what it raises.
        """
        passed, positions, _ = self.read(token_ids, mask, pixels=pixels, grids=grids, runtime=runtime)
        first = positions.amax(dim=(0, 2)) + 1
        return speak(self._trunk(), passed, mask, first, end=end, most=most, lora=self.lora, runtime=runtime)

    def step(
        self,
        z: Tensor,
        t: Tensor,
        prefix: PrefixState,
        *,
        iterations: int = 4,
        every_iteration: bool = False,
        through: bool = True,
        runtime: Runtime = DEFAULT_RUNTIME,
    ) -> StepResult:
        """Return velocity and edits of noised latents z `b c h w` at times t `b`, in the dtype of z.

        Args:
            z: in the dtype that matrices compute in.
            t: in [0, 1], 1 = noise.
            prefix: of `encode`, for the same batch and size.
            iterations: 1 to 8; beyond those that a model was trained with quality falls.
            every_iteration: also evaluate the diffusion head after the earlier iterations.
            through: whether gradients run from an iteration into those before it.
            runtime: the attention product; blocks are of the kinds `trunk` and `diffusion`.

        Raises: ShapeError if the latents do not fit; ConfigError for a number of iterations out of range.
        """
        velocities, done = [], []
        for found in self.refine(z, t, prefix, iterations=iterations, through=through, runtime=runtime):
            done.append(found)
            if every_iteration or len(done) == iterations:
                suffix = self.diffusion_head.read(found.passed.taps, z.dtype)
                velocities.append(
                    self.diffusion_head(
                        z,
                        t,
                        found.passed.hidden[:, 1],
                        edits=found.edits,
                        features=prefix.features,
                        reads=[_joined(a, b) for a, b in zip(prefix.reads, suffix, strict=True)],
                        keep=functional.pad(prefix.keep, (0, self.config.suffix_length), value=True),
                        runtime=runtime,
                    )
                )
        return StepResult(
            velocity=velocities[-1],
            noised=z,
            time=t,
            edits=done[-1].edits,
            iterations=tuple(found.edit for found in done),
            early=tuple(velocities[:-1]),
        )

    def refine(
        self,
        z: Tensor,
        t: Tensor,
        prefix: PrefixState,
        *,
        iterations: int = 4,
        through: bool = True,
        runtime: Runtime = DEFAULT_RUNTIME,
    ) -> Iterator[Refinement]:
        """Yield the iterations of a step, one by one, without a velocity; arguments are those of `step`.

        Raises: as `step`.
        """
        check_latents(self.config, z, t, prefix.keep.shape[0], prefix.size)
        if not 1 <= iterations <= MAX_ITERATIONS:
            raise ConfigError(f"iterations must lie in 1..{MAX_ITERATIONS}, got {iterations}")
        base = self.memory.base(z, t, prefix.features, prefix.estimate)
        time = self.tokens.timestep(t, z.dtype)
        past, edits = prefix.past, None
        for k in range(iterations):
            memory = self.memory(base, edits, z.dtype)
            passed = self._suffix(self.tokens(time, k), memory, prefix, past, k, runtime)
            edit = self.edit_head(memory, passed.hidden, runtime)
            past, edits = passed.past, edit.write(edits)
            yield Refinement(passed, edit, edits)
            if not through:
                past, edits = past.cut(prefix.past.length), edits.detach()

    def forward(
        self,
        z: Tensor,
        t: Tensor,
        token_ids: Tensor,
        token_mask: Tensor | None = None,
        *,
        pixels: Tensor | None = None,
        grids: Tensor | None = None,
        prefix: PrefixState | None = None,
        record: Callable[[StepResult], None] | None = None,
        iterations: int = 4,
        runtime: Runtime = DEFAULT_RUNTIME,
    ) -> Tensor:
        """Return the velocity `b c h w`: `encode`, unless its result is given as prefix, and `step`.

        A single prompt serves all latents of a batch. record is called with the step's result.
        Raises: as `encode` and `step`.
        """
        if prefix is None:
            size = (z.shape[-2], z.shape[-1])
            prefix = self.encode(
                token_ids, token_mask, size=size, pixels=pixels, grids=grids, dtype=z.dtype, runtime=runtime
            )
        if prefix.keep.shape[0] == 1:
            prefix = prefix.repeat(z.shape[0])
        result = self.step(z, t, prefix, iterations=iterations, runtime=runtime)
        if record is not None:
            record(result)
        return result.velocity

    def _is_image(self, token_ids: Tensor, mask: Tensor) -> Tensor:
        """Return which tokens `b m` are visual ones."""
        image: int = self.config.trunk["image_token_id"]
        return (token_ids == image) & mask

    def _suffix(
        self, x: Tensor, memory: Tensor, prefix: PrefixState, past: Past, iteration: int, runtime: Runtime
    ) -> Pass:
        """Return the pass of one iteration's tokens x `b s d`, which look at the memory."""
        length = x.shape[1]
        reads = {layer: self._adapter(layer).attn.read(memory) for layer in self.config.adapter_layers}

        def after(layer: int, h: Tensor) -> Tensor:
            return self._adapter(layer)(h, reads[layer], runtime.attention) if layer in reads else h

        start = prefix.first_position[:, None] + iteration * length
        places = start + torch.arange(length, device=x.device)  # b s
        return run_decoder(
            self._trunk(),
            x.to(past.layers[0].keys.dtype),
            places.expand(3, -1, -1),
            keep=suffix_mask(prefix.keep, length, iteration),
            past=past,
            taps=self.config.context_layers,
            after=after,
            lora=self.lora,
            runtime=runtime,
        )

    def _with_room(self, past: Past) -> Past:
        """Return the past with room for the suffixes of a step, unless gradients run through it."""
        if torch.is_grad_enabled():
            return past
        room = (0, 0, 0, MAX_ITERATIONS * self.config.suffix_length)
        layers = (KeysValues(*(functional.pad(part, room) for part in layer)) for layer in past.layers)
        return Past(tuple(layers), past.length)

    def _adapter(self, layer: int) -> Adapter:
        return cast("Adapter", self.adapters[str(layer)])

    def _trunk(self) -> nn.Module:
        if self.trunk is None:
            raise ConfigError("Exo must have a trunk before it is used, got none; attach the Qwen3-VL model")
        return self.trunk


def _joined(first: Sequence[Tensor], second: Sequence[Tensor]) -> KeysValuesPair:
    """Return keys and values of two parts of a context as those of one."""
    return KeysValuesPair(*(torch.cat(parts, dim=2) for parts in zip(first, second, strict=True)))


def _in_rows(found: Tensor, has_image: Tensor) -> Tensor:
    """Return what was made of pictures `i c h w` in the rows `b` that have one, zero in the others."""
    if bool(has_image.all()):
        return found
    empty = found.new_zeros(len(has_image), *found.shape[1:])
    return empty.index_copy(0, has_image.nonzero()[:, 0], found)
