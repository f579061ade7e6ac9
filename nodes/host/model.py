"""The networks as ComfyUI builds and calls them, and the adapter between its conditioning and flowcore's."""

from collections.abc import Callable, Mapping
from typing import Any

import comfy.conds
import comfy.model_base
import comfy.ops
import comfy.supported_models_base
import torch
from comfy.ldm.modules.attention import optimized_attention, optimized_attention_masked
from comfy.patcher_extension import WrapperExecutor, WrappersMP, get_all_wrappers
from einops import rearrange
from torch import Tensor, nn

from ...flowcore.errors import ShapeError
from ...flowcore.layers.norm import rms_norm
from ...flowcore.models.xut.blocks import RMSNorm
from ...flowcore.models.xut.config import XUTConfig
from ...flowcore.models.xut.model import XUDiT
from ...flowcore.models.xut.velocity import velocity
from ...flowcore.ops import Runtime
from . import xut_conds
from .operations import to_ops, use_operations

# Stock nodes that skip or replace blocks know two kinds.
_STOCK_KINDS = {"enc": "double_block", "dec": "single_block"}


class _RMSNorm(RMSNorm, comfy.ops.CastWeightBiasOp):
    """XUT's norm with its weight brought to the input, and patched by a LoRA, at use."""

    comfy_cast_weights = True
    weight_function: list[Any] = []  # noqa: RUF012 - ComfyUI's contract: class attributes
    bias_function: list[Any] = []  # noqa: RUF012

    def forward(self, x: Tensor, scale: Tensor | float = 1.0) -> Tensor:
        weight, _ = comfy.ops.cast_bias_weight(self, x, dtype=torch.float32)
        return rms_norm(x, eps=1e-6) * (weight * scale)


class XutNetwork(XUDiT):
    """XUDiT out of ComfyUI's layers. Subclassed, not held: keys stay `diffusion_model.<original key>`."""

    def __init__(
        self,
        *,
        config: XUTConfig,
        image_model: str,  # noqa: ARG002 - ComfyUI passes all of unet_config
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
        operations: Any = None,  # noqa: ANN401 - a namespace of layer classes
    ) -> None:
        """Build the network; ComfyUI reads the attribute `dtype`."""
        super().__init__(config, ops=to_ops(operations), device=device, dtype=dtype)
        use_operations(self, operations, {RMSNorm: _RMSNorm})
        self.dtype = dtype

    def forward(  # type: ignore[override] # ComfyUI's call; flowcore's is `super().forward`
        self,
        x: Tensor,
        timestep: Tensor,
        context: Tensor | None = None,
        control: Any = None,  # noqa: ANN401
        transformer_options: Mapping[str, Any] | None = None,
        **extras: Any,
    ) -> Tensor:
        """Return the velocity `b c h w` of noised latents at sigma = timestep in [0, 1]."""
        options = transformer_options or {}
        wrappers = get_all_wrappers(WrappersMP.DIFFUSION_MODEL, options)
        executor = WrapperExecutor.new_class_executor(self._velocity, self, wrappers)
        return executor.execute(x, timestep, context, control, options, **extras)

    def _velocity(
        self,
        x: Tensor,
        timestep: Tensor,
        context: Tensor | None,
        control: Any,  # noqa: ANN401, ARG002
        transformer_options: Mapping[str, Any],
        **extras: Any,
    ) -> Tensor:
        conditioning, options = xut_conds.unpack(x, timestep, context, extras, self.config)
        runtime = Runtime(
            attention=_attention(transformer_options), run_block=_block_runner(transformer_options)
        )
        return velocity(super().forward, x, timestep, conditioning, runtime=runtime, **options)


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


def _block_runner(transformer_options: Mapping[str, Any]) -> Callable[..., Tensor]:
    """Return the hook that lets stock and other nodes replace blocks, under XUT's names or the stock ones."""
    replacements = transformer_options.get("patches_replace", {}).get("dit", {})

    def run_block(kind: str, index: int, block: Callable[..., Tensor], x: Tensor) -> Tensor:
        replacement = replacements.get((kind, index), replacements.get((_STOCK_KINDS.get(kind), index)))
        if replacement is None:
            return block(x)
        changed = replacement({"img": x}, {"original_block": lambda entries: {"img": block(entries["img"])}})
        return changed["img"]

    return run_block


class FlowCoreModel(comfy.model_base.BaseModel):
    """ComfyUI's model around a network: conditions in, velocity out, sigma from 1 (noise) to 0."""

    def __init__(
        self,
        model_config: comfy.supported_models_base.BASE,
        *,
        network: type[nn.Module],
        device: torch.device | None = None,
    ) -> None:
        """Build the network without weights."""
        super().__init__(model_config, comfy.model_base.ModelType.FLOW, device=device, unet_model=network)
        self.diffusion_model.eval()  # older versions leave it in training mode
        patch = model_config.unet_config["config"].patch_size
        # A text token weighs as much as an image token, which is patch x patch latent cells.
        self.memory_usage_factor_conds = ("c_crossattn",)
        self.memory_usage_shape_process = {"c_crossattn": lambda shape: [shape[0], 1, shape[1] * patch**2]}

    def process_timestep(self, timestep: Tensor, **_: Any) -> Tensor:
        """Return sigma in [0, 1]: stock ModelSampling nodes bring multipliers of their own."""
        return timestep / getattr(self.model_sampling, "multiplier", 1.0)

    def extra_conds(self, **conditions: Any) -> dict[str, comfy.conds.CONDRegular]:
        """Return what the network is given for one part of the conditioning.

        Raises: ShapeError or ConfigError if the conditions are not for this model.
        """
        found = super().extra_conds(**conditions)
        config = self.model_config.unet_config["config"]
        for name in (
            "c_crossattn",
            "crossattn_controlnet",
        ):  # they repeat short prompts, which joint attention sees
            found.pop(name, None)
        context = conditions.get("cross_attn")
        if context is not None and config.ctx_dim is not None and "flowcore_class" not in conditions:
            found.update(_text_conds(context, conditions.get("attention_mask"), config.ctx_dim))
        found.update(xut_conds.pack(conditions, config))
        return found

    def extra_conds_shapes(self, **conditions: Any) -> dict[str, list[int]]:
        """Return the shape of the text, which counts towards the memory estimate."""
        context = conditions.get("cross_attn")
        return {} if context is None else {"c_crossattn": list(context.shape)}


def _text_conds(context: Tensor, mask: Tensor | None, width: int) -> dict[str, comfy.conds.CONDRegular]:
    """Return text states and, where something is masked, their mask as integers, never cast."""
    if context.shape[-1] != width:
        raise ShapeError(
            f"text states for this model must be {width} wide, got {context.shape[-1]}; "
            "load the text encoder that it was trained with"
        )
    found = {"c_crossattn": comfy.conds.CONDRegular(context)}
    if mask is not None:
        mask = rearrange(mask, "... m -> (...) m").bool()[:, : context.shape[1]]
        # Nodes that join prompts lengthen the text and leave the mask of the first one.
        mask = nn.functional.pad(mask, (0, context.shape[1] - mask.shape[1]), value=True)
        if not bool(mask.all()):
            found["context_mask"] = comfy.conds.CONDRegular(mask.long())
    return found
