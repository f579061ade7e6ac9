"""The adapter between ComfyUI's conditioning and sampling and a network."""

import logging
from typing import Any

import comfy.conds
import comfy.model_base
import comfy.supported_models_base
import torch
from comfy.model_base import ModelType
from einops import rearrange
from torch import Tensor, nn

from ...flowcore.conditioning import Conditioning
from ...flowcore.errors import ConfigError, ShapeError

logger = logging.getLogger("flowcore")
EMPTY_PROMPT = "flowcore_empty"
"""Entry of a conditioning that our text encoders made from an empty prompt: its number of tokens."""
TEXT_START = "flowcore_text_start"
"""Entry of a conditioning whose text stands behind padding: the number of tokens before it."""


class FlowCoreModel(comfy.model_base.BaseModel):
    """ComfyUI's model around a network: conditions in, velocity out, sigma from 1 (noise) to 0."""

    def __init__(
        self,
        model_config: comfy.supported_models_base.BASE,
        model_type: ModelType,
        *,
        device: torch.device | None = None,
    ) -> None:
        """Build the network without weights."""
        self.host = model_config.unet_config["host"]
        self.architecture = model_config.unet_config["architecture"]
        self.config = model_config.unet_config["config"]
        self.text_shape = self.architecture.text_shape(self.config)
        super().__init__(model_config, model_type, device=device, unet_model=self.host.network)
        self.diffusion_model.eval()  # older versions leave it in training mode
        cells = self.host.token_side(self.config) ** 2
        # A text token weighs as much as an image token.
        self.memory_usage_factor_conds = (*self.memory_usage_factor_conds, "c_crossattn")
        self.memory_usage_shape_process = {"c_crossattn": lambda shape: [shape[0], 1, shape[1] * cells]}

    def process_timestep(self, timestep: Tensor, **_: Any) -> Tensor:
        """Return sigma in [0, 1]: stock ModelSampling nodes bring multipliers of their own."""
        return timestep / getattr(self.model_sampling, "multiplier", 1.0)

    def encode_adm(self, **conditions: Any) -> Tensor | None:
        """Return the pooled vector `b d` for a model that takes one.

        Raises: ShapeError if it is of another width.
        """
        pooled, width = conditions.get("pooled_output"), self.text_shape.pooled
        if pooled is None or width is None:
            return None
        _check_width("the pooled vector", pooled, width)
        return pooled

    def extra_conds(self, **conditions: Any) -> dict[str, comfy.conds.CONDRegular]:
        """Return what the network is given for one part of the conditioning.

        Raises: ShapeError or ConfigError if the conditions are not for this model.
        """
        if _is_null(conditions):
            text = Conditioning(context=conditions["cross_attn"], pooled=conditions.get("pooled_output"))
            null = self.architecture.null_text(text)
            conditions |= {"cross_attn": null.context, "pooled_output": null.pooled}
        mask = conditions.pop("attention_mask", None)
        if mask is not None and "attention_mask_img_shape" in conditions:
            raise ConfigError(
                "strength_type must be 'multiply' for this model, got an attention mask of a picture"
            )
        found = super().extra_conds(**conditions)
        # They repeat short prompts, which joint attention sees.
        for name in ("c_crossattn", "crossattn_controlnet"):
            found.pop(name, None)
        context, width = conditions.get("cross_attn"), self.text_shape.width
        if context is not None and width is not None and "flowcore_class" not in conditions:
            _check_width("text states", context, width)
            found.update(_text_conds(self._cut(context, conditions.get(TEXT_START, 0)), mask))
        found.update(self.host.pack(conditions, self.config))
        return found

    def _cut(self, context: Tensor, start: int) -> Tensor:
        """Return the tokens that a model with a most of them was trained to read; start: of the text."""
        length, count = self.text_shape.length, context.shape[1]
        if not self.host.cuts_text or count <= length:
            return context
        if count - start > length:
            logger.warning(
                "a prompt of %d tokens was cut to the %d that the model reads", count - start, length
            )
        first = min(start, count - length)
        return context[:, first : first + length]

    def extra_conds_shapes(self, **conditions: Any) -> dict[str, list[int]]:
        """Return the shapes that count towards the memory estimate besides the latents'."""
        found = super().extra_conds_shapes(**conditions)
        context = conditions.get("cross_attn")
        return found if context is None else {**found, "c_crossattn": list(context.shape)}


class FluxModel(FlowCoreModel, comfy.model_base.Flux):
    """The model around Flux. ComfyUI's own brings control channels, references, and more names of LoRAs."""


def _is_null(conditions: dict[str, Any]) -> bool:
    """Say whether a part of the conditioning is an empty negative prompt, to which nothing was joined."""
    num_tokens = conditions.get(EMPTY_PROMPT)
    context = conditions.get("cross_attn")
    is_negative = conditions.get("prompt_type") == "negative"
    return is_negative and context is not None and context.shape[1] == num_tokens


def _check_width(what: str, tensor: Tensor, width: int) -> None:
    if tensor.shape[-1] != width:
        raise ShapeError(
            f"{what} for this model must be {width} wide, got {tensor.shape[-1]}; "
            "load the text encoder that it was trained with"
        )


def _text_conds(context: Tensor, mask: Tensor | None) -> dict[str, comfy.conds.CONDRegular]:
    """Return text states and, where something is masked, their mask as integers, never cast."""
    found = {"c_crossattn": comfy.conds.CONDRegular(context)}
    if mask is not None:
        mask = rearrange(mask, "... m -> (...) m").bool()[:, : context.shape[1]]
        # Nodes that join prompts lengthen the text and leave the mask of the first one.
        mask = nn.functional.pad(mask, (0, context.shape[1] - mask.shape[1]), value=True)
        if not bool(mask.all()):
            found["context_mask"] = comfy.conds.CONDRegular(mask.long())
    return found
