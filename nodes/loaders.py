"""Loaders: a weight file to ComfyUI's own MODEL, CLIP or VAE, with the architecture found in the file."""

from comfy_api.latest import io

from .files import Kind, check, choices, find, fingerprint
from .schema import schema

DTYPES = ("default", "float32", "bfloat16", "float16", "fp8_e4m3fn", "fp8_e5m2")
TEXT_MODES = ("sequence", "pooled")
TEXT_FOR = ("auto", "xut", "flux", "tinyflux", "single_stream")
NO_FILE = "none"


def dtype_input() -> io.Input:
    """Return the choice of the precision of a model's weights."""
    return io.Combo.Input(
        "weight_dtype",
        options=list(DTYPES),
        default="default",
        tooltip="Precision of the weights in memory. 'default' suits the device; fp8 halves the memory of "
        "16-bit weights at some loss of quality.",
    )


def model_outputs(info: str) -> list[io.Output]:
    """Return the sockets of a loaded model and of the line about it; info: what that tells."""
    return [
        io.Model.Output(display_name="model", tooltip="Model for KSampler and every other stock node."),
        io.String.Output(display_name="info", tooltip=info),
    ]


class LoadModel(io.ComfyNode):
    """A diffusion model as MODEL."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="FlowCoreLoadModel",
            display_name="Load FlowCore Model",
            category="FlowCore/loaders",
            description="Loads an xut, flux, tinyflux or single_stream model for the stock samplers; the "
            "file tells which it is.",
            search_aliases=[
                "load diffusion model",
                "unet loader",
                "checkpoint",
                "xut",
                "flux",
                "tinyflux",
                "single stream",
                "flowcore",
            ],
            inputs=[
                io.Combo.Input(
                    "model_name",
                    options=choices(Kind.MODEL),
                    tooltip="File in models/diffusion_models, or one of the bundled models (flowcore-...).",
                ),
                dtype_input(),
            ],
            outputs=model_outputs("Architecture, size and latent space of the file."),
        )

    @classmethod
    def validate_inputs(cls, model_name: str) -> bool | str:
        return check(Kind.MODEL, model_name)

    @classmethod
    def fingerprint_inputs(cls, model_name: str, weight_dtype: str) -> str:
        return f"{fingerprint(Kind.MODEL, model_name)}-{weight_dtype}"

    @classmethod
    def execute(cls, *, model_name: str, weight_dtype: str = "default") -> io.NodeOutput:
        """Return the model and a line about it."""
        from .host.loading import load_model

        return io.NodeOutput(*load_model(find(Kind.MODEL, model_name), weight_dtype))


class LoadTextEncoder(io.ComfyNode):
    """One text encoder, or two that make a pair, as CLIP."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="FlowCoreLoadTextEncoder",
            display_name="Load FlowCore Text Encoder",
            category="FlowCore/loaders",
            description="Loads a Gemma-3, T5Gemma2 or T5 text encoder with its tokenizer, alone or with a "
            "CLIP, for the stock CLIP Text Encode node. Offline.",
            search_aliases=["load clip", "dual clip", "text encoder", "gemma", "t5", "t5gemma", "flowcore"],
            inputs=[
                io.Combo.Input(
                    "clip_name",
                    options=choices(Kind.TEXT),
                    tooltip="File in models/text_encoders, or a bundled encoder (flowcore-...). Beside a "
                    "file from elsewhere its tokenizer.json must lie, and the config.json of a Gemma.",
                ),
                io.Combo.Input(
                    "text_mode",
                    options=list(TEXT_MODES),
                    default="sequence",
                    tooltip="'sequence' gives the model every token; 'pooled' one vector for the whole "
                    "prompt (Gemma-3 only). Choose what the model was trained with.",
                ),
                io.Combo.Input(
                    "clip_name2",
                    options=[NO_FILE, *choices(Kind.TEXT)],
                    default=NO_FILE,
                    optional=True,
                    tooltip="The other file of a pair: tinyflux and FLUX.1 want a T5 and a CLIP, in any "
                    "order.",
                ),
                io.Combo.Input(
                    "text_for",
                    options=list(TEXT_FOR),
                    default="auto",
                    optional=True,
                    tooltip="Architecture that reads the text; decides how prompts are cut and padded. "
                    "'auto' takes T5-XXL for flux; a T5 is the only encoder that needs another choice.",
                ),
            ],
            outputs=[io.Clip.Output(display_name="clip", tooltip="Text encoder for CLIP Text Encode.")],
        )

    @classmethod
    def validate_inputs(cls, clip_name: str, clip_name2: str = NO_FILE) -> bool | str:
        results = [check(Kind.TEXT, name) for name in _chosen(clip_name, clip_name2)]
        return next((result for result in results if result is not True), True)

    @classmethod
    def fingerprint_inputs(
        cls, clip_name: str, text_mode: str, clip_name2: str = NO_FILE, text_for: str = "auto"
    ) -> str:
        files = [fingerprint(Kind.TEXT, name) for name in _chosen(clip_name, clip_name2)]
        return "-".join([*files, text_mode, text_for])

    @classmethod
    def execute(
        cls,
        *,
        clip_name: str,
        text_mode: str = "sequence",
        clip_name2: str = NO_FILE,
        text_for: str = "auto",
    ) -> io.NodeOutput:
        """Return the text encoder."""
        from .host.text import load_clip

        paths = [find(Kind.TEXT, name) for name in _chosen(clip_name, clip_name2)]
        return io.NodeOutput(load_clip(paths, text_mode, text_for))


def _chosen(*names: str) -> list[str]:
    """Return the names of the files that are chosen."""
    return [name for name in names if name != NO_FILE]


class LoadVAE(io.ComfyNode):
    """An autoencoder as VAE."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="FlowCoreLoadVAE",
            display_name="Load FlowCore VAE",
            category="FlowCore/loaders",
            description="Loads a KL autoencoder (SD1.5, SDXL, EQ-SDXL, SD3, FLUX.1, FLUX.2 or bundled) for "
            "the stock VAE nodes.",
            search_aliases=["load vae", "autoencoder", "decode", "flowcore"],
            inputs=[
                io.Combo.Input(
                    "vae_name",
                    options=choices(Kind.VAE),
                    tooltip="File in models/vae, or a bundled VAE (flowcore-...). It must be the one that "
                    "the model "
                    "was trained with.",
                ),
            ],
            outputs=[io.Vae.Output(display_name="vae", tooltip="VAE for VAE Decode and VAE Encode.")],
        )

    @classmethod
    def validate_inputs(cls, vae_name: str) -> bool | str:
        return check(Kind.VAE, vae_name)

    @classmethod
    def fingerprint_inputs(cls, vae_name: str) -> str:
        return fingerprint(Kind.VAE, vae_name)

    @classmethod
    def execute(cls, *, vae_name: str) -> io.NodeOutput:
        """Return the autoencoder."""
        from .host.vae import load_comfy_vae

        return io.NodeOutput(load_comfy_vae(find(Kind.VAE, vae_name)))
