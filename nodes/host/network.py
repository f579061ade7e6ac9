"""The networks as ComfyUI builds and calls them: flowcore's models out of ComfyUI's layers."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from comfy.ldm.modules.attention import optimized_attention, optimized_attention_masked
from comfy.patcher_extension import WrapperExecutor, WrappersMP, get_all_wrappers
from torch import Tensor, nn
from torch.nn import functional

from ...flowcore.conditioning import Conditioning
from ...flowcore.layers.norm import RMSNorm
from ...flowcore.layers.patch import pad_to_multiple
from ...flowcore.models import Architecture
from ...flowcore.models.flux import PATCH_SIZE, Flux
from ...flowcore.models.single_stream import SingleStreamDiT
from ...flowcore.models.tinyflux import TinyFlux
from ...flowcore.models.xut import XUDiT
from ...flowcore.ops import Runtime
from .operations import CastRMSNorm, to_ops, use_operations

if TYPE_CHECKING:
    from .hosts import Host

# Where ControlNets put what they add to the image after each block of a kind.
_CONTROL = {"double_block": "input", "single_block": "output"}


class Network(nn.Module):
    """What stands before a flowcore model in the bases of a class, so that `super().forward` is the model's.

    Subclassed, not held: keys stay `diffusion_model.<original key>`.
    """

    def __init__(
        self,
        *,
        architecture: Architecture,
        host: "Host",
        config: Any,  # noqa: ANN401 - each architecture's own
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
        operations: Any = None,  # noqa: ANN401 - a namespace of layer classes
        **_: Any,  # ComfyUI passes all of unet_config
    ) -> None:
        """Build the network; ComfyUI reads the attribute `dtype`."""
        super().__init__(config, ops=to_ops(operations), device=device, dtype=dtype)
        use_operations(self, operations, {RMSNorm: CastRMSNorm})
        self.architecture, self.host, self.dtype = architecture, host, dtype

    @property
    def latent_channels(self) -> int:
        """Channels of the latents, behind which x may hold others."""
        return self.architecture.latent_channels(self.config)

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        context: Tensor | None = None,
        control: Mapping[str, Any] | None = None,
        transformer_options: Mapping[str, Any] | None = None,
        **extras: Any,
    ) -> Tensor:
        """Return the velocity of noised latents `b c h w`, or `b c n`, at sigma = timestep in [0, 1].

        x may hold channels behind those of the latents; extras: what the conditioning has besides the text.
        """
        options = transformer_options or {}
        wrappers = get_all_wrappers(WrappersMP.DIFFUSION_MODEL, options)
        executor = WrapperExecutor.new_class_executor(self._velocity, self, wrappers)
        return executor.execute(x, timestep, context, control, options, **extras)

    def _velocity(
        self,
        x: Tensor,
        timestep: Tensor,
        context: Tensor | None,
        control: Mapping[str, Any] | None,
        transformer_options: Mapping[str, Any],
        **extras: Any,
    ) -> Tensor:
        height, width = x.shape[-2:]
        channels = self.latent_channels
        x = pad_to_multiple(x, self.host.token_side(self.config))
        named, options = self.host.unpack(x, timestep, extras, self.config)
        if x.shape[1] > channels:
            named["control"] = x[:, channels:]
        mask = extras.get("context_mask")
        conditioning = Conditioning(
            context=context,
            context_mask=None if mask is None else mask.bool(),
            pooled=extras.get("y"),
            extras=named,
        )
        num_text = 0 if context is None else context.shape[1]
        runtime = Runtime(
            attention=_attention(transformer_options),
            run_block=_block_runner(self.host.stock_kinds, transformer_options, control or {}, num_text),
        )
        velocity = self.architecture.velocity(
            super().forward, x[:, :channels], timestep, conditioning, runtime=runtime, **options
        )
        return velocity[..., :height, :width]


class XutNetwork(Network, XUDiT):
    """XUDiT in ComfyUI."""


class FluxNetwork(Network, Flux):
    """Flux in ComfyUI, whose own code for it reads the attribute `patch_size`."""

    patch_size = PATCH_SIZE


class SequenceNetwork(Network, Flux):
    """Flux between sequences, in ComfyUI."""

    @property
    def latent_channels(self) -> int:
        """Channels of a token."""
        return self.config.out_channels


class TinyFluxNetwork(Network, TinyFlux):
    """TinyFlux in ComfyUI."""


class SingleStreamNetwork(Network, SingleStreamDiT):
    """SingleStreamDiT in ComfyUI."""


def _attention(transformer_options: Mapping[str, Any]) -> Callable[..., Tensor]:
    """Return attention by the kernel that the user chose for ComfyUI, or that an extension brings."""

    def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        options = {"skip_reshape": True, "transformer_options": transformer_options}
        if bias is None:
            return optimized_attention(q, k, v, q.shape[1], **options)
        if bias.dtype == torch.bool:
            bias = torch.zeros_like(bias, dtype=q.dtype).masked_fill(~bias, -torch.inf)
        full = bias.to(q.dtype).expand(q.shape[0], 1, q.shape[2], k.shape[2])  # some kernels do not broadcast
        return optimized_attention_masked(q, k, v, q.shape[1], mask=full, **options)

    return attention


def _block_runner(
    stock_kinds: Mapping[str, str],
    transformer_options: Mapping[str, Any],
    control: Mapping[str, Any],
    num_text: int,
) -> Callable[..., Tensor]:
    """Return the hook that lets other nodes replace blocks, and ControlNets add to what they put out.

    Blocks go by the architecture's names or by the stock ones. Text comes first in the sequence.
    """
    replacements = transformer_options.get("patches_replace", {}).get("dit", {})

    def run_block(kind: str, index: int, block: Callable[..., Tensor], x: Tensor) -> Tensor:
        stock_kind = stock_kinds.get(kind, kind)
        replacement = replacements.get((kind, index), replacements.get((stock_kind, index)))
        if replacement is None:
            x = block(x)
        else:
            original = {"original_block": lambda entries: {"img": block(entries["img"])}}
            x = replacement({"img": x, "transformer_options": transformer_options}, original)["img"]
        added = control.get(_CONTROL.get(stock_kind, ""), [])[index : index + 1]
        if not added or added[0] is None:
            return x
        rest = x.shape[1] - num_text - added[0].shape[1]
        return x + functional.pad(added[0].to(x), (0, 0, num_text, rest))

    return run_block
