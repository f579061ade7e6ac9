"""The ComfyUI nodes. Only ComfyUI imports this package; models come in when a node runs."""

from comfy_api.latest import ComfyExtension, io

from .conditioning import XutAspect, XutCamera, XutClass, XutTread
from .guidance import GuidanceAPG, GuidanceCFGZero, GuidanceInterval, GuidanceRescale
from .latents import EmptyLatent
from .loaders import LoadModel, LoadTextEncoder, LoadVAE
from .sampling import Sigmas
from .sequences import (
    EmptySequence,
    LoadSequences,
    SequenceConditioning,
    SequenceDecode,
    SequenceEncode,
    SequencePreview,
)

NODES: tuple[type[io.ComfyNode], ...] = (
    LoadModel,
    LoadTextEncoder,
    LoadVAE,
    EmptyLatent,
    Sigmas,
    XutCamera,
    XutTread,
    XutClass,
    XutAspect,
    GuidanceCFGZero,
    GuidanceAPG,
    GuidanceRescale,
    GuidanceInterval,
    LoadSequences,
    SequenceConditioning,
    EmptySequence,
    SequenceEncode,
    SequenceDecode,
    SequencePreview,
)


class FlowCoreExtension(ComfyExtension):
    """The list of nodes in the form that ComfyUI asks for."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """Return the node classes."""
        return list(NODES)


def extension() -> FlowCoreExtension:
    """Return the extension object for `comfy_entrypoint`."""
    return FlowCoreExtension()
