"""SingleStreamDiT, a diffusion transformer of one stream with filters by spatial frequency.

    latents -> patches -> noise refiners ----+
                                             +--> joint blocks -> (filters) -> projection -> velocity
    text ----> tokens --> context refiners --+
    time ----> modulation of every block that sees the image

Text tokens carry a learned position, image tokens are turned by theirs. Both variants are one figure: V3 has
a filter in every block that sees the image, HEAD has them in the noise refiners and after the joint blocks.

Source: Particle1904/SingleStreamDiT_T5Gemma2, model.py.
"""

from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from ...errors import ShapeError
from ...layers.embeddings import sinusoidal
from ...layers.norm import RMSNorm, at_use
from ...ops import DEFAULT_RUNTIME, TORCH_OPS, Ops, Runtime
from .blocks import ContextBlock, FusionBlock, Signals, run_blocks
from .config import SingleStreamConfig
from .fourier import FilteredResidual
from .inputs import check_inputs
from .positions import grid_angles, joint_rotation
from .start import initialize

_TIME_DIM = 256


class SingleStreamDiT(nn.Module):
    """Predicts the velocity clean - noise of noised latents; time runs from 0 = noise to 1 = clean."""

    def __init__(
        self,
        config: SingleStreamConfig,
        *,
        ops: Ops = TORCH_OPS,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Build the layers with the reference's initial values, under which the output is zero."""
        super().__init__()
        self.config = config
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        dim = config.hidden_size

        self.text_pos_embed = nn.Parameter(torch.empty(1, config.max_token_length, dim, **where))
        self.x_pad_token = nn.Parameter(torch.empty(1, 1, dim, **where))  # in files, never used
        self.cap_pad_token = nn.Parameter(torch.empty(1, 1, dim, **where))
        self.x_embedder = ops.linear(config.token_dim, dim, **where)
        self.cap_embedder = nn.Sequential(
            RMSNorm(config.text_embed_dim, device), ops.linear(config.text_embed_dim, dim, **where)
        )
        self.t_embedder = nn.Sequential(
            ops.linear(_TIME_DIM, dim, **where), nn.SiLU(), ops.linear(dim, dim, **where)
        )

        def fusion(count: int, *, has_filter: bool) -> nn.ModuleList:
            return nn.ModuleList(
                FusionBlock(config, has_filter=has_filter, ops=ops, **where) for _ in range(count)
            )

        self.noise_refiner = fusion(config.refiner_depth, has_filter=config.use_fourier_in_refiner)
        self.context_refiner = nn.ModuleList(
            ContextBlock(config, ops=ops, **where) for _ in range(config.refiner_depth)
        )
        self.blocks = fusion(config.depth, has_filter=config.variant == "v3")
        self.final_fourier_blocks = nn.ModuleList(
            FilteredResidual(config, ops=ops, device=device) for _ in range(config.fourier_stack_depth)
        )
        self.final_norm = RMSNorm(dim, device)
        self.final_layer = ops.linear(dim, config.token_dim, **where)
        initialize(
            (self.x_embedder, self.cap_embedder[1], self.t_embedder[0], self.t_embedder[2]),
            (self.x_pad_token, self.cap_pad_token, self.text_pos_embed),
            (*self.noise_refiner, *self.context_refiner, *self.blocks, *self.final_fourier_blocks),
            self.final_layer,
        )

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        text_embeds: Tensor | None = None,
        *,
        text_mask: Tensor | None = None,
        generator: torch.Generator | None = None,
        runtime: Runtime = DEFAULT_RUNTIME,
    ) -> Tensor:
        """Return the velocity `b c h w` of latents x `b c h w`, computed in the dtype of x.

        Args:
            x: noised latents, sides multiples of the patch size.
            t: times `b` in [0, 1], 0 = pure noise, float32 whatever the dtype of x.
            text_embeds: text `b m k`; a sample that is all zeros has no text; None = no text in any sample.
            text_mask: `b m` boolean, True = token that others see; the published models see all of them,
                padding included, which is what None does.
            generator: source of the dropout in training.
            runtime: replacements of the attention product and of blocks.

        Raises: ShapeError if an input has the wrong shape, or training with dropout lacks a generator.
        """
        check_inputs(self.config, x, t, text_embeds, text_mask)
        dtype, patch = x.dtype, self.config.patch_size
        rows, columns = (side // patch for side in x.shape[-2:])
        seeds = self._dropout_seeds(generator)
        time: Tensor = self.t_embedder(sinusoidal(t.reshape(-1), _TIME_DIM).to(dtype))  # b d
        text, text_bias = self._embed_text(x, text_embeds, text_mask)  # b m d, b 1 1 m
        num_text = text.shape[1]
        angles = grid_angles(rows, columns, self.config.head_dim, self.config.rope_base, x.device)
        rotation = joint_rotation(angles, num_text)
        image = self._embed_image(x)  # b n d
        bias = (
            None if text_bias is None else functional.pad(text_bias, (0, rows * columns), value=True)
        )  # b 1 1 l

        for_text = Signals(condition=time, bias=text_bias)
        for_image = Signals(
            condition=time, rotation=rotation.last(rows * columns), rows=rows, columns=columns
        )
        for_both = Signals(condition=time, rotation=rotation, bias=bias, rows=rows, columns=columns)
        refined = self.config.refiner_depth
        image = run_blocks("noise_refiner", self.noise_refiner, image, for_image, runtime, seeds[:refined])
        text = run_blocks("context_refiner", self.context_refiner, text, for_text, runtime, [None] * refined)
        stream = torch.cat((text, image), dim=1)  # b (m + n) d
        stream = run_blocks("blocks", self.blocks, stream, for_both, runtime, seeds[refined:])

        image = stream[:, num_text:]
        for block in cast("Iterable[FilteredResidual]", self.final_fourier_blocks):
            image = block(image, rows, columns)
        patches: Tensor = self.final_layer(self.final_norm(image).to(dtype))  # b n (c p p)
        return rearrange(patches, "b (h w) (c p q) -> b c (h p) (w q)", h=rows, w=columns, p=patch, q=patch)

    def _embed_image(self, x: Tensor) -> Tensor:
        """Return image tokens `b n d`, float32."""
        patch = self.config.patch_size
        tokens: Tensor = self.x_embedder(rearrange(x, "b c (h p) (w q) -> b (h w) (c p q)", p=patch, q=patch))
        return tokens.float()

    def _embed_text(
        self, x: Tensor, text: Tensor | None, mask: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Return text tokens `b m d`, float32, and the mask `b 1 1 m` of those that are seen."""
        config = self.config
        if text is None:
            text = x.new_zeros(x.shape[0], config.max_token_length, config.text_embed_dim)
        norm, project = self.cap_embedder
        tokens: Tensor = project(norm(text).to(x.dtype)).float()
        has_text = text.flatten(1).any(dim=1)[:, None, None]  # b 1 1
        tokens = torch.where(has_text, tokens, at_use(self.cap_pad_token, tokens))
        tokens = tokens + at_use(self.text_pos_embed, tokens)[:, : text.shape[1]]
        if mask is None:
            return tokens, None
        # Where everything is masked, the first token stays: text that sees nothing has no attention.
        first = torch.arange(mask.shape[1], device=mask.device) == 0
        seen = mask.bool() | (first & ~mask.any(dim=1, keepdim=True))
        return tokens, seen[:, None, None]

    def _dropout_seeds(self, generator: torch.Generator | None) -> Sequence[int | None]:
        """Return a seed for each block that drops values, Nones where none does."""
        count = self.config.refiner_depth + self.config.depth
        if not self.training or not self.config.dropout:
            return [None] * count
        if generator is None:
            raise ShapeError(
                f"generator must be given in training with dropout, got None with {self.config.dropout}"
            )
        seeds: list[int] = torch.randint(
            2**62, (count,), generator=generator, device=generator.device
        ).tolist()
        return seeds
