"""Flux, which carries one sequence of tokens into another under the condition of a third.

    data tokens --------> img_in --+
    condition tokens ---> txt_in --+-> double blocks -> single blocks -> data tokens -> last layer -> velocity
    time, guidance, y --> vec -------> modulation of every block
    positions ----------> rotation of queries and keys

The data may be patches of an image (then this is FLUX.1), points, or anything else that has positions.

Source: Souymodip/flux_core, model.py; black-forest-labs/flux, model.py; both compute the same.
"""

from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...errors import ConfigError
from ...layers.embeddings import sinusoidal
from ...layers.pooling import masked_mean
from ...layers.rope import Rotation, position_rotation
from ...ops import DEFAULT_RUNTIME, TORCH_OPS, Ops, Runtime
from .blocks import DoubleStreamBlock, LastLayer, MLPEmbedder, ModulationHead, Signals, SingleStreamBlock
from .config import FluxConfig
from .inputs import check_inputs

Init = Literal["reference", "zero"]

SCALAR_DIM = 256
"""Width of the sinusoidal embedding of a number."""


class Flux(nn.Module):
    """Predicts the velocity noise - clean of noised tokens; time runs from 0 = clean to 1 = noise."""

    def __init__(
        self,
        config: FluxConfig,
        *,
        init: Init = "reference",
        ops: Ops = TORCH_OPS,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Build the layers.

        init: `reference` leaves torch's initial values everywhere, as the originals do; `zero`, for training
        from scratch, makes every block the identity and the output zero at first.
        Raises: ConfigError for another init.
        """
        super().__init__()
        if init not in get_args(Init):
            raise ConfigError(f"init must be one of {get_args(Init)}, got {init!r}")
        self.config = config
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        dim = config.hidden_size

        self.img_in = ops.linear(config.in_channels, dim, **where)
        self.time_in = MLPEmbedder(SCALAR_DIM, dim, ops=ops, **where)
        self.vector_in = MLPEmbedder(config.vec_in_dim, dim, ops=ops, **where)
        self.guidance_in = MLPEmbedder(SCALAR_DIM, dim, ops=ops, **where) if config.guidance_embed else None
        self.txt_in = ops.linear(config.context_in_dim, dim, **where)
        self.double_blocks = nn.ModuleList(
            DoubleStreamBlock(config, ops=ops, **where) for _ in range(config.depth)
        )
        self.single_blocks = nn.ModuleList(
            SingleStreamBlock(config, ops=ops, **where) for _ in range(config.depth_single_blocks)
        )
        self.final_layer = LastLayer(config, ops=ops, **where)
        if init == "zero":
            self._init_zero()

    def forward(
        self,
        img: Tensor,
        img_ids: Tensor,
        txt: Tensor,
        txt_ids: Tensor,
        timesteps: Tensor,
        y: Tensor | None = None,
        guidance: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        runtime: Runtime = DEFAULT_RUNTIME,
    ) -> Tensor:
        """Return the velocity `b n k` of noised data tokens, computed in the dtype of img.

        Args:
            img: noised data tokens `b n c`.
            img_ids: their positions `b n a` or `1 n a`, whole numbers or float32; any value.
            txt: condition tokens `b m d`.
            txt_ids: their positions `b m a` or `1 m a`.
            timesteps: times `b` in [0, 1], 1 = pure noise, float32 whatever the dtype of img.
            y: vector `b d` of the whole condition; None leaves it out, which is not the same as zeros; in a
                model with `pooled_from_text`, None takes the mean of txt.
            guidance: strength `b` of the distilled guidance; read by models that embed it, else ignored.
            mask: `b (m n)` boolean, True = real token, condition tokens first; None attends to every token.
            runtime: replacements of the attention product and of blocks.

        Raises: ShapeError if an input has the wrong shape, or the model needs one that is missing.
        """
        check_inputs(
            self.config,
            img,
            img_ids,
            txt,
            txt_ids,
            timesteps,
            y=y,
            guidance=guidance,
            mask=mask,
            in_channels=self.img_in.weight.shape[1],  # a control LoRA may have widened the layer
        )
        if y is None and self.config.pooled_from_text:
            y = masked_mean(txt, None if mask is None else mask[:, : txt.shape[1]])
        vec = self._condition(img.dtype, timesteps, y, guidance)  # b 1 d
        signals = Signals(
            condition=functional.silu(vec),
            rotation=self._rotation(txt_ids, img_ids),
            bias=None if mask is None else mask[:, None, None],  # b 1 1 l
            num_text=txt.shape[1],
        )
        x = torch.cat((self.txt_in(txt.to(img.dtype)), self.img_in(img)), dim=1).float()  # b l d
        for kind, blocks in (("double", self.double_blocks), ("single", self.single_blocks)):
            for index, block in enumerate(blocks):
                call = partial(block, signals=signals, attention=runtime.attention)
                x = runtime.run_block(kind, index, call, x)
        velocity: Tensor = self.final_layer(x[:, signals.num_text :], vec)
        return velocity

    def _condition(
        self, dtype: torch.dtype, timesteps: Tensor, y: Tensor | None, guidance: Tensor | None
    ) -> Tensor:
        """Return the vector `b 1 d` that the modulations are made from."""
        vec: Tensor = self.time_in(_embedding(timesteps, dtype))
        if self.guidance_in is not None and guidance is not None:
            vec = vec + self.guidance_in(_embedding(guidance, dtype))
        if y is not None:
            vec = vec + self.vector_in(y.to(dtype))
        return vec[:, None]

    def _rotation(self, txt_ids: Tensor, img_ids: Tensor) -> Rotation:
        """Return the rotation of the joint sequence, of batch 1 where the samples share their positions."""
        batch = max(txt_ids.shape[0], img_ids.shape[0])
        positions = torch.cat([ids.expand(batch, -1, -1) for ids in (txt_ids, img_ids)], dim=1)
        return position_rotation(positions, self.config.axes_dim, self.config.theta)

    def _init_zero(self) -> None:
        """Set modulations and the last layer to zero, and embedders to small normal weights without bias."""
        for module in self.modules():
            if isinstance(module, ModulationHead):
                _fill(module.lin, std=0.0)
            elif isinstance(module, MLPEmbedder):
                _fill(module.in_layer, std=0.02)
                _fill(module.out_layer, std=0.02)
        _fill(self.final_layer.adaLN_modulation[1], std=0.0)
        _fill(self.final_layer.linear, std=0.0)


def _embedding(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the embedding `b 256` of numbers `b`; only its result has the dtype of the model."""
    return sinusoidal(1000 * values.float().reshape(-1), SCALAR_DIM).to(dtype)


def _fill(layer: nn.Module, *, std: float) -> None:
    """Draw the layer's weights from a normal law, and set its bias to zero."""
    assert isinstance(layer, nn.Linear)
    nn.init.normal_(layer.weight, std=std)
    nn.init.zeros_(layer.bias)
