"""ComfyUI's layers in the place of those that transformers builds its text networks from.

Known by the names of their classes: the module of a network that nobody loads is not imported.
"""

from typing import Any

import comfy.ops
import torch
from torch import Tensor, nn

from ...flowcore.layers.norm import rms_norm
from .operations import use_operations


class _Embedding(comfy.ops.manual_cast.Embedding):
    """An embedding whose states are float32, in which everything after it computes."""

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids, out_dtype=torch.float32).float()


class _GemmaEmbedding(_Embedding):
    """Gemma-3's, scaled."""

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * self.embedding_dim**0.5


class _T5GemmaEmbedding(_Embedding):
    """T5Gemma2's, scaled by a number of the weights' precision; an image's end has a vector of its own."""

    def forward(self, ids: Tensor) -> Tensor:
        has_eight_bits = self.weight.dtype.itemsize == 1
        scale = self.embed_scale.to(torch.bfloat16 if has_eight_bits else self.weight.dtype).to(ids.device)
        states = super().forward(ids) * scale.float()
        return torch.where((ids == self.eoi_token_index)[..., None], self.eoi_embedding.to(states), states)


class _Norm(nn.Module, comfy.ops.CastWeightBiasOp):
    """T5's norm, its weight brought to the input, and patched, at use."""

    comfy_cast_weights = True
    weight_function: list[Any] = []  # noqa: RUF012 - ComfyUI's contract: class attributes
    bias_function: list[Any] = []  # noqa: RUF012

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.variance_epsilon, self.factor(x)).type_as(x)

    def factor(self, x: Tensor) -> Tensor:
        """Return what the normalised x is multiplied by, float32."""
        weight, _ = comfy.ops.cast_bias_weight(self, x, dtype=torch.float32)
        return weight


class _GemmaNorm(_Norm):
    """Gemma's: its weight counts from 1."""

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.eps, 1.0 + self.factor(x)).type_as(x)


_CHANGES: dict[str, type[nn.Module]] = {
    "Embedding": _Embedding,
    "Gemma3TextScaledWordEmbedding": _GemmaEmbedding,
    "Gemma3RMSNorm": _GemmaNorm,
    "T5Gemma2TextScaledWordEmbedding": _T5GemmaEmbedding,
    "T5Gemma2RMSNorm": _GemmaNorm,
    "T5LayerNorm": _Norm,
}


def use_text_operations(network: nn.Module) -> nn.Module:
    """Change all layers of a text network to ComfyUI's, in place, and return it."""
    kinds = {type(layer) for layer in network.modules()}
    special = {kind: _CHANGES[kind.__name__] for kind in kinds if kind.__name__ in _CHANGES}
    return use_operations(network, comfy.ops.manual_cast, special)
