"""XUDiT, the cross-U diffusion transformer.

    latents -> patches ---+                                        +--> projection -> velocity
    text ----> tokens ----+-> front blocks -> [ ENC > DEC ] -> back blocks
    time, sizes, class --> modulation of every block

Text is appended to the image tokens, or cross-attended. In training a share of the image tokens bypasses the
bracket (TREAD). Every decoder stage starts with cross-attention to the encoder's output.

Source: KohakuBlueleaf/HDM, src/xut, and its technical report.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...errors import ShapeError
from ...layers.modulation import modulation
from ...layers.norm import FloatLayerNorm
from ...layers.patch import pad_to_multiple, unpatchify
from ...ops import DEFAULT_RUNTIME, TORCH_OPS, Ops, Runtime
from .backbone import Backbone, PlainBlocks, Routing, choose_tokens
from .blocks import PatchEmbed, SharedModulation, Signals, TimestepEmbedding, UnPatch, zero_init
from .config import XUTConfig
from .inputs import check_inputs
from .positions import axial_positions, pool_positions


@dataclass(frozen=True, slots=True)
class Stream:
    """Tokens `b n d` in float32, those of a rows x columns image first, with what steers the blocks."""

    tokens: Tensor
    signals: Signals
    rows: int
    columns: int

    @property
    def num_image(self) -> int:
        """How many tokens are image tokens."""
        return self.rows * self.columns


class XUDiT(nn.Module):
    """Predicts the velocity noise - clean of noised latents; time runs from 0 = clean to 1 = noise."""

    def __init__(
        self,
        config: XUTConfig,
        *,
        ops: Ops = TORCH_OPS,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Build the layers with torch's initial values, zero modulation heads and a nearly zero output."""
        super().__init__()
        self.config = config
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        dim = config.dim

        self.in_patch = PatchEmbed(config, ops=ops, device=device)
        self.time_emb = TimestepEmbedding(dim, ops=ops, device=device)
        self.r_emb = TimestepEmbedding(dim, ops=ops, device=device) if config.double_t else None
        self.class_token = ops.embedding(config.class_cond, dim, **where) if config.class_cond else None
        self.ctx_proj = None
        if config.concat_ctx and config.ctx_dim is not None:
            self.ctx_proj = ops.float_linear(config.ctx_dim, dim, device=device)
        self.addon_info_embs_proj = None
        if config.addon_info_embs_dim is not None:
            self.addon_info_embs_proj = nn.Sequential(
                ops.float_linear(config.addon_info_embs_dim, dim, device=device),
                nn.Mish(),
                zero_init(ops.float_linear(dim, dim, device=device)),
            )

        def shared_head() -> nn.Sequential:
            return nn.Sequential(
                FloatLayerNorm(dim, eps=config.ln_eps, device=device),
                ops.float_linear(dim, 4 * dim, device=device),
                nn.Mish(),
                zero_init(ops.float_linear(4 * dim, 3 * dim, device=device)),
            )

        self.shared_adaln_attn = shared_head() if config.shared_adaln else None
        self.shared_adaln_xattn = shared_head() if config.shared_adaln else None
        self.shared_adaln_ffw = shared_head() if config.shared_adaln else None

        self.prev_tread_trns = self.post_tread_trns = None
        if config.tread_config is not None:
            before, after = config.tread_config.prev_trns_depth, config.tread_config.post_trns_depth
            self.prev_tread_trns = PlainBlocks(config, before, ops=ops, **where)
            self.post_tread_trns = PlainBlocks(config, after, ops=ops, **where)
        self.backbone = Backbone(config, ops=ops, **where)
        self.out_patch = UnPatch(config, ops=ops, device=device)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        ctx: Tensor | None = None,
        *,
        ctx_mask: Tensor | None = None,
        pos_map: Tensor | None = None,
        r: Tensor | None = None,
        addon_info: Tensor | None = None,
        tread_rate: float | None = None,
        generator: torch.Generator | None = None,
        runtime: Runtime = DEFAULT_RUNTIME,
    ) -> Tensor:
        """Return the velocity `b c h w` of latents x `b c h w`, computed in the dtype of x.

        Args:
            x: noised latents; sides that are no multiple of the patch size are padded and cropped again.
            t: times `b` in [0, 1], 1 = pure noise, float32 whatever the dtype of x.
            ctx: text `b m k`, or class ids `b` in a class-conditional model; None = `ctx_size` zero rows.
            ctx_mask: `b m` boolean, True = real token; None attends to every row.
            pos_map: positions (y, x) of the padded latents, `b (h w) 2` or `1 (h w) 2`; None = plain grid.
            r: second time `b` of a `double_t` model.
            addon_info: `b` or `b k`; ln(width / height) in the published model.
            tread_rate: share of the image tokens that bypass the backbone; 0 = none; None = none at inference
                and the configured share in training.
            generator: source of that choice.
            runtime: replacements of the attention product and of blocks.

        Raises: ShapeError if an input has the wrong shape or the model has no layer for it.
        """
        height, width = x.shape[-2:]
        stream = self.embed(x, t, ctx, ctx_mask=ctx_mask, pos_map=pos_map, r=r, addon_info=addon_info)
        tokens, _ = self.transform(stream, tread_rate=tread_rate, generator=generator, runtime=runtime)
        patches = self.out_patch(tokens[:, : stream.num_image]).to(x.dtype)  # b n (p p c)
        latents = unpatchify(patches, stream.rows, stream.columns, self.config.patch_size)  # b c h w
        return latents[..., :height, :width]

    def embed(
        self,
        x: Tensor,
        t: Tensor,
        ctx: Tensor | None = None,
        *,
        ctx_mask: Tensor | None = None,
        pos_map: Tensor | None = None,
        r: Tensor | None = None,
        addon_info: Tensor | None = None,
    ) -> Stream:
        """Return the tokens that enter the blocks; arguments as in `forward`."""
        x = pad_to_multiple(x, self.config.patch_size)
        check_inputs(self.config, x, t, ctx, ctx_mask=ctx_mask, pos_map=pos_map, r=r, addon_info=addon_info)
        rows, columns = (side // self.config.patch_size for side in x.shape[-2:])
        class_ids, ctx = (ctx, None) if self.config.class_cond else (None, ctx)
        condition = self._condition(t, class_ids, r, addon_info)  # b 1 d
        positions = self._positions(rows, columns, pos_map, x.device)  # 1 n 2 or b n 2
        tokens = self.in_patch(x).float()  # b n d
        if ctx is None and self.config.ctx_dim is not None:
            ctx = x.new_zeros(x.shape[0], self.config.ctx_size, self.config.ctx_dim)
        context_bias = None if ctx_mask is None else ctx_mask.bool()[:, None, None]  # b 1 1 m
        bias = None
        if self.ctx_proj is not None:
            text = self.ctx_proj(ctx).float()  # b m d
            if context_bias is not None:
                bias = functional.pad(context_bias, (tokens.shape[1], 0), value=True)  # b 1 1 (n + m)
            tokens = torch.cat((tokens, text), dim=1)  # b (n + m) d
            positions = torch.cat(
                (positions, positions.new_zeros(positions.shape[0], text.shape[1], 2)), dim=1
            )
            ctx = context_bias = None
        signals = Signals(
            dtype=x.dtype,
            condition=condition,
            shared=self._shared_modulation(condition),
            positions=positions,
            bias=bias,
            context=ctx,
            context_bias=context_bias,
        )
        return Stream(tokens, signals, rows, columns)

    def transform(
        self,
        stream: Stream,
        *,
        tread_rate: float | None = None,
        generator: torch.Generator | None = None,
        runtime: Runtime = DEFAULT_RUNTIME,
    ) -> tuple[Tensor, Tensor]:
        """Return the tokens `b n d` after all blocks, and the encoder's output for the image tokens it saw.

        Arguments as in `forward`.
        """
        x, signals = stream.tokens, stream.signals
        if self.prev_tread_trns is None or self.post_tread_trns is None:
            x, encoded = self.backbone(x, signals, runtime)
            return x, encoded[:, : stream.num_image]
        x = self.prev_tread_trns("pre", x, signals, runtime)
        routing = self._routing(stream, tread_rate, generator)
        if routing is None:
            x, encoded = self.backbone(x, signals, runtime)
            num_seen = stream.num_image
        else:
            routed, encoded = self.backbone(routing.pick(x), routing.pick_signals(signals), runtime)
            x = routing.put_back(routed, x)
            num_seen = routing.kept.shape[1]
        x = self.post_tread_trns("post", x, signals, runtime)
        return x, encoded[:, :num_seen]

    def _condition(
        self,
        t: Tensor,
        class_ids: Tensor | None,
        r: Tensor | None,
        addon_info: Tensor | None,
    ) -> Tensor:
        """Return the vector `b 1 d`, float32, that the modulations are made from."""
        t = t.float().reshape(-1)
        condition: Tensor = self.time_emb(t)
        if r is not None and self.r_emb is not None:
            condition = condition + self.r_emb(t - r.float().reshape(-1))
        if class_ids is not None and self.class_token is not None:
            condition = condition + self.class_token(class_ids.reshape(-1, 1)).float()
        if addon_info is not None and self.addon_info_embs_proj is not None:
            addon = addon_info[:, None] if addon_info.ndim == 1 else addon_info
            condition = condition + self.addon_info_embs_proj(addon.float())[:, None]
        return condition

    def _shared_modulation(self, condition: Tensor) -> SharedModulation | None:
        if self.shared_adaln_attn is None or self.shared_adaln_xattn is None or self.shared_adaln_ffw is None:
            return None
        return SharedModulation(
            attn=modulation(self.shared_adaln_attn(condition)),
            xattn=modulation(self.shared_adaln_xattn(condition)),
            ffw=modulation(self.shared_adaln_ffw(condition)),
        )

    def _positions(self, rows: int, columns: int, pos_map: Tensor | None, device: torch.device) -> Tensor:
        if pos_map is None:
            return axial_positions(rows, columns, device=device)[None]
        return pool_positions(pos_map, rows, columns, self.config.patch_size)

    def _routing(
        self, stream: Stream, tread_rate: float | None, generator: torch.Generator | None
    ) -> Routing | None:
        """Return the choice of tokens for the backbone, or None when all go through it."""
        tread = self.config.tread_config
        rate = tread_rate
        if rate is None:
            rate = tread.dropout_ratio if tread is not None and self.training else 0.0
        if not rate:
            return None
        if not 0 < rate < 1:
            raise ShapeError(f"tread_rate must be in [0, 1), got {rate}")
        if generator is None:
            raise ShapeError(
                f"generator must be given when tokens are routed, got None with tread_rate {rate}"
            )
        kept = choose_tokens(stream.tokens.shape[0], stream.num_image, rate, generator)
        return Routing(kept.to(stream.tokens.device), stream.num_image)
