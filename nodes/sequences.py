"""Flux between sequences: load a trained model, say what it goes by; read, write and show its sequences."""

from comfy_api.latest import io

from .files import Kind, check, choices, find, fingerprint
from .loaders import dtype_input, model_outputs
from .schema import schema

CATEGORY = "FlowCore/sequences"
DEFAULT_FILE = "curves.safetensors"
HOW_TO_TRAIN = (
    "or train it in the extension's folder with 'python -m training.sequences curves' and copy "
    f"runs/curves/final/model.safetensors to models/diffusion_models/{DEFAULT_FILE}"
)


def _model_input() -> io.Input:
    return io.Model.Input("model", tooltip="Model from Load Flux Sequences; it knows its spaces.")


def _source_inputs(what: str) -> list[io.Input]:
    return [
        io.String.Input(
            "numbers",
            multiline=True,
            default="",
            tooltip=f"Samples of the {what} as JSON lists, or one as rows of numbers, such as x and y of a "
            "point a line. Leave it empty to give an image or a latent.",
        ),
        io.Image.Input(
            "image",
            optional=True,
            tooltip=f"Pictures as the {what}, of the size in pixels that the model was trained with.",
        ),
        io.Latent.Input(
            "latent", optional=True, tooltip=f"Latents of a VAE, or other samples, as the {what}."
        ),
    ]


class LoadSequences(io.ComfyNode):
    """A Flux that carries one sequence into another, as MODEL."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        names = [name for name in choices(Kind.MODEL) if not name.startswith("flowcore-")]
        return schema(
            node_id="FlowCoreLoadSequences",
            display_name="Load Flux Sequences",
            category=CATEGORY,
            description="Loads a Flux that python -m training.sequences has trained between two data spaces, "
            "for the stock samplers.",
            search_aliases=["sequence to sequence", "flux core", "transport", "curves", "points"],
            inputs=[
                io.Combo.Input(
                    "model_name",
                    options=sorted({DEFAULT_FILE, *names}),
                    default=DEFAULT_FILE,
                    tooltip="File in models/diffusion_models, from python -m training.sequences.",
                ),
                dtype_input(),
            ],
            outputs=model_outputs("Architecture, size and spaces of the file."),
        )

    @classmethod
    def validate_inputs(cls, model_name: str) -> bool | str:
        found = check(Kind.MODEL, model_name)
        return found if found is True else f"{found}, {HOW_TO_TRAIN}"

    @classmethod
    def fingerprint_inputs(cls, model_name: str, weight_dtype: str) -> str:
        return f"{fingerprint(Kind.MODEL, model_name)}-{weight_dtype}"

    @classmethod
    def execute(cls, *, model_name: str, weight_dtype: str = "default") -> io.NodeOutput:
        """Return the model and a line about it."""
        from .host.loading import load_sequences

        return io.NodeOutput(*load_sequences(find(Kind.MODEL, model_name), weight_dtype))


class SequenceConditioning(io.ComfyNode):
    """What a Flux between sequences goes by: a sample of its condition space."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="FlowCoreSequenceConditioning",
            display_name="Sequence Conditioning",
            category=CATEGORY,
            description="Conditions a Flux between sequences on numbers, pictures or latents of its "
            "condition space; the negative one is told nothing.",
            search_aliases=["sequence", "condition tokens", "positions"],
            inputs=[_model_input(), *_source_inputs("condition")],
            outputs=[
                io.Conditioning.Output(display_name="positive", tooltip="The condition."),
                io.Conditioning.Output(
                    display_name="negative", tooltip="No condition, tokens of zeros, for guidance."
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        *,
        model: io.Model.Type,
        numbers: str = "",
        image: io.Image.Type | None = None,
        latent: io.Latent.Type | None = None,
    ) -> io.NodeOutput:
        """Return both conditionings."""
        from .host.sequences import make_conditioning

        return io.NodeOutput(*make_conditioning(model, numbers, image, latent))


class EmptySequence(io.ComfyNode):
    """Zeros `b c n` as the start of sampling."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="FlowCoreEmptySequence",
            display_name="Empty Sequence",
            category=CATEGORY,
            description="An empty latent sequence of the length and width that a Flux between sequences "
            "makes.",
            search_aliases=["empty latent", "sequence length"],
            inputs=[
                _model_input(),
                io.Int.Input(
                    "batch_size",
                    default=1,
                    min=1,
                    max=4096,
                    tooltip="Sequences per run; more need more memory.",
                ),
            ],
            outputs=[io.Latent.Output(display_name="latent", tooltip="Zeros, batch x channels x tokens.")],
        )

    @classmethod
    def execute(cls, *, model: io.Model.Type, batch_size: int) -> io.NodeOutput:
        """Return the zeros."""
        from .host.sequences import make_empty

        return io.NodeOutput(make_empty(model, batch_size))


class SequenceEncode(io.ComfyNode):
    """Samples of the data space as a latent sequence."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="FlowCoreSequenceEncode",
            display_name="Sequence Encode",
            category=CATEGORY,
            description="Numbers, pictures or latents of a Flux's data space as a latent sequence, to start "
            "from, or to show the truth beside a result.",
            search_aliases=["sequence", "tokens", "encode"],
            inputs=[_model_input(), *_source_inputs("data")],
            outputs=[
                io.Latent.Output(
                    display_name="encoded",
                    tooltip="Tokens, batch x channels x tokens: for a sampler at a denoise below 1.",
                ),
                io.Noise.Output(
                    display_name="source",
                    tooltip="The same in the place of noise, for models trained with source: paired.",
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        *,
        model: io.Model.Type,
        numbers: str = "",
        image: io.Image.Type | None = None,
        latent: io.Latent.Type | None = None,
    ) -> io.NodeOutput:
        """Return the tokens in both forms."""
        from .host.sequences import encode

        return io.NodeOutput(*encode(model, numbers, image, latent))


class SequenceDecode(io.ComfyNode):
    """A latent sequence as the samples that it stands for."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="FlowCoreSequenceDecode",
            display_name="Sequence Decode",
            category=CATEGORY,
            description="The numbers that a latent sequence of a Flux stands for.",
            search_aliases=["sequence", "tokens", "decode", "numbers"],
            inputs=[
                _model_input(),
                io.Latent.Input("samples", tooltip="Latent sequence, as a sampler makes it."),
            ],
            outputs=[
                io.String.Output(display_name="numbers", tooltip="A list of samples in JSON."),
                io.Latent.Output(
                    display_name="latent",
                    tooltip="The samples as they are: for VAE Decode if the data are latents of a VAE.",
                ),
            ],
        )

    @classmethod
    def execute(cls, *, model: io.Model.Type, samples: io.Latent.Type) -> io.NodeOutput:
        """Return the samples in both forms."""
        from .host.sequences import decode

        return io.NodeOutput(*decode(model, samples))


class SequencePreview(io.ComfyNode):
    """Pictures of what a latent sequence stands for."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="FlowCoreSequencePreview",
            display_name="Sequence Preview",
            category=CATEGORY,
            description="Draws what a latent sequence of a Flux stands for: points as dots, series as lines, "
            "symbols as stripes, pictures as they are.",
            search_aliases=["sequence", "plot", "scatter", "preview"],
            inputs=[
                _model_input(),
                io.Latent.Input("samples", tooltip="Latent sequence, as a sampler makes it."),
                io.Int.Input(
                    "size",
                    default=512,
                    min=16,
                    max=4096,
                    tooltip="Side of the pictures in pixels; larger is finer.",
                ),
            ],
            outputs=[io.Image.Output(display_name="image", tooltip="A picture for every sequence.")],
        )

    @classmethod
    def execute(cls, *, model: io.Model.Type, samples: io.Latent.Type, size: int) -> io.NodeOutput:
        """Return the pictures."""
        from .host.sequences import preview

        return io.NodeOutput(preview(model, samples, size))
