"""What XUT models are told besides the text: camera, token dropping, class, aspect ratio.

Every node returns changed copies; a conditioning that comes in is in ComfyUI's cache and stays as it is.
"""

from typing import Any, TypeAlias

from comfy_api.latest import io

from .schema import schema

Conditioning: TypeAlias = list[list[Any]]
CATEGORY = "FlowCore/conditioning"


def with_values(conditioning: Conditioning, **values: Any) -> Conditioning:
    """Return a copy of the conditioning with more entries in the dictionary of every part."""
    return [[tensor, {**entries, **values}] for tensor, entries in conditioning]


def _pair_inputs() -> list[io.Input]:
    """Return the two sockets that most of the nodes have."""
    return [
        io.Conditioning.Input("positive", tooltip="Conditioning of the prompt."),
        io.Conditioning.Input("negative", tooltip="Conditioning of the negative prompt."),
    ]


def _pair_outputs() -> list[io.Output]:
    return [
        io.Conditioning.Output(display_name="positive", tooltip="Changed copy of the positive conditioning."),
        io.Conditioning.Output(display_name="negative", tooltip="Changed copy of the negative conditioning."),
    ]


class XutCamera(io.ComfyNode):
    """Move and zoom the window that an XUT model sees."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="FlowCoreXutCamera",
            display_name="XUT Camera",
            category=CATEGORY,
            description="Moves and zooms the view of an XUT model through its position grid. Only models "
            "trained with "
            "shifted crops follow it well.",
            search_aliases=["camera", "zoom", "pan", "position map", "hdm"],
            inputs=[
                *_pair_inputs(),
                io.Float.Input(
                    "zoom",
                    default=1.0,
                    min=0.2,
                    max=5.0,
                    step=0.01,
                    tooltip="Above 1 zooms in, below 1 zooms out.",
                ),
                io.Float.Input(
                    "x_shift",
                    default=0.0,
                    min=-5.0,
                    max=5.0,
                    step=0.01,
                    tooltip="Moves the view right, in halves of the longer side; negative moves it left.",
                ),
                io.Float.Input(
                    "y_shift",
                    default=0.0,
                    min=-5.0,
                    max=5.0,
                    step=0.01,
                    tooltip="Moves the view down, in halves of the longer side; negative moves it up.",
                ),
            ],
            outputs=_pair_outputs(),
        )

    @classmethod
    def execute(
        cls, *, positive: Conditioning, negative: Conditioning, zoom: float, x_shift: float, y_shift: float
    ) -> io.NodeOutput:
        camera = {"flowcore_camera": (zoom, x_shift, y_shift)}
        return io.NodeOutput(with_values(positive, **camera), with_values(negative, **camera))


class XutTread(io.ComfyNode):
    """Drop tokens inside an XUT model, more in the negative branch than in the positive."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="FlowCoreXutTread",
            display_name="XUT Token Dropping",
            category=CATEGORY,
            description="Lets a share of the image tokens skip the middle of an XUT model (TREAD). A "
            "larger share in the "
            "negative branch guides towards detail. Only for models trained with token routing.",
            search_aliases=["tread", "token dropping", "auto guidance", "gamma", "hdm"],
            inputs=[
                *_pair_inputs(),
                io.Float.Input(
                    "positive_rate",
                    default=0.0,
                    min=0.0,
                    max=0.9,
                    step=0.01,
                    tooltip="Share of tokens dropped with the positive prompt, 0 to 1; 0 drops none.",
                ),
                io.Float.Input(
                    "negative_rate",
                    default=0.25,
                    min=0.0,
                    max=0.9,
                    step=0.01,
                    tooltip="Share of tokens dropped with the negative prompt; larger guides more, 0 drops "
                    "none.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=True,
                    tooltip="Which tokens are dropped; the same seed drops the same ones.",
                ),
            ],
            outputs=_pair_outputs(),
        )

    @classmethod
    def execute(
        cls,
        *,
        positive: Conditioning,
        negative: Conditioning,
        positive_rate: float,
        negative_rate: float,
        seed: int,
    ) -> io.NodeOutput:
        return io.NodeOutput(
            with_values(positive, flowcore_tread=(positive_rate, seed)),
            with_values(negative, flowcore_tread=(negative_rate, seed)),
        )


class XutClass(io.ComfyNode):
    """A class number as conditioning, for models without a text encoder."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="FlowCoreXutClass",
            display_name="XUT Class",
            category=CATEGORY,
            description="Conditions a class-conditional XUT model on a class number, with no class as the "
            "negative.",
            search_aliases=["class label", "imagenet", "class conditional"],
            inputs=[
                io.Int.Input(
                    "class_id",
                    default=0,
                    min=0,
                    max=1_000_000,
                    tooltip="Number of the class, counted from 0.",
                ),
            ],
            outputs=[
                io.Conditioning.Output(display_name="positive", tooltip="The class."),
                io.Conditioning.Output(display_name="negative", tooltip="No class, for guidance."),
            ],
        )

    @classmethod
    def execute(cls, *, class_id: int) -> io.NodeOutput:
        import torch

        empty = torch.zeros(1, 1, 1)  # a text socket must carry a tensor; the model does not look at it
        return io.NodeOutput([[empty, {"flowcore_class": class_id}]], [[empty, {"flowcore_class": None}]])


class XutAspect(io.ComfyNode):
    """Tell an XUT model another aspect ratio than that of the latent."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="FlowCoreXutAspect",
            display_name="XUT Aspect",
            category=CATEGORY,
            description="Tells an XUT model the aspect ratio of the whole picture, for latents that are a "
            "part of it. "
            "Without this node the latent's own ratio is used.",
            search_aliases=["aspect ratio", "addon info", "size conditioning", "hdm"],
            inputs=[
                *_pair_inputs(),
                io.Int.Input(
                    "width", default=1024, min=1, max=65536, tooltip="Width of the whole picture in pixels."
                ),
                io.Int.Input(
                    "height", default=1024, min=1, max=65536, tooltip="Height of the whole picture in pixels."
                ),
            ],
            outputs=_pair_outputs(),
        )

    @classmethod
    def execute(
        cls, *, positive: Conditioning, negative: Conditioning, width: int, height: int
    ) -> io.NodeOutput:
        aspect = {"flowcore_aspect": width / height}
        return io.NodeOutput(with_values(positive, **aspect), with_values(negative, **aspect))
