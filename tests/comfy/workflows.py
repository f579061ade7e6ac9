"""The bundled workflows, each described once: its nodes, where they lie on the page, and the note beside it.

`python -m tests.comfy write` makes the files in `workflows/` from these.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from flowcore.assets import list_builtin

FOLDER = Path(__file__).resolve().parents[2] / "workflows"
TEXT_TO_IMAGE = "_text_to_image"

Prompt = dict[str, Any]
Place = tuple[int, int, int, int]
"""Left, top, width, height on the page."""


class Placed(NamedTuple):
    """A node in API form, where it lies, and its title if it has one of its own."""

    kind: str
    inputs: Mapping[str, Any]
    place: Place
    title: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workflow:
    """A workflow; its nodes by their numbers, its groups by their titles.

    is_ready: whether all its weights are bundled.
    """

    name: str
    nodes: Mapping[str, Placed]
    groups: Mapping[str, Place]
    note: str
    note_place: Place = (40, 700, 800, 330)
    is_ready: bool = True

    @property
    def path(self) -> Path:
        """Its file."""
        return FOLDER / f"{self.name}.json"

    @property
    def thumbnail(self) -> Path:
        """The picture that the page lists it with."""
        return self.path.with_suffix(".jpg")

    @property
    def prompt(self) -> Prompt:
        """The nodes in API form."""
        return {
            number: {"class_type": node.kind, "inputs": dict(node.inputs)}
            for number, node in self.nodes.items()
        }

    def to_dict(self) -> dict[str, Any]:
        """What the page needs to build it."""
        return {
            "name": self.name,
            "prompt": self.prompt,
            "places": {number: node.place for number, node in self.nodes.items()},
            "titles": {number: node.title for number, node in self.nodes.items() if node.title},
            "groups": dict(self.groups),
            "note": self.note,
            "note_place": self.note_place,
        }


class Facts(NamedTuple):
    """What differs between the architectures in a workflow from text to image."""

    title: str
    files: str


FACTS: Mapping[str, Facts] = {
    "xut": Facts(
        "XUT",
        "Put an XUT file into `models/diffusion_models`, its text encoder into `models/text_encoders` and "
        "its VAE into `models/vae`, press *R*, and choose them in the three loaders on the left.",
    ),
    "flux": Facts(
        "Flux",
        "Put a FLUX.1 file into `models/diffusion_models`, T5-XXL and CLIP-L into `models/text_encoders` and "
        "its VAE into `models/vae`, press *R*, and choose them on the left, the CLIP as `clip_name2`. FLUX.1 "
        "wants cfg 1 and 1024 x 1024; [dev] takes a *FluxGuidance* behind the prompt, [schnell] 4 steps.",
    ),
    "tinyflux": Facts(
        "TinyFlux",
        "Put a TinyFlux-Deep file into `models/diffusion_models`, Flan-T5-base and CLIP-L into "
        "`models/text_encoders` and the VAE of FLUX.1 into `models/vae`, press *R*, and choose them on the "
        "left, the CLIP as `clip_name2`, with `text_for` at `tinyflux`. TinyFlux-Deep wants 512 x 512, 28 "
        "steps and cfg 5.",
    ),
    "single_stream": Facts(
        "SingleStreamDiT",
        "Put a SingleStreamDiT file into `models/diffusion_models`, its T5Gemma2 into `models/text_encoders` "
        "and the VAE of FLUX.1 into `models/vae`, press *R*, and choose them in the three loaders on the "
        "left. The published ones want 50 steps, and 448 x 448 or more.",
    ),
}

CURVES_FILE = "curves.safetensors"
CAPTION = "a small yellow star above a large purple square on a white background"


def text_to_image(architecture: str) -> Workflow:
    """The workflow of an architecture on its bundled demo."""
    facts = FACTS[architecture]
    text = {
        "clip_name": "flowcore-scenes-text.safetensors",
        "text_mode": "sequence",
        "clip_name2": "none",
        "text_for": "auto",
    }
    size = {"width": 128, "height": 128, "batch_size": 1, "latent_space": "auto", "model": ["1", 0]}
    links = {"model": ["1", 0], "positive": ["4", 0], "negative": ["5", 0], "latent_image": ["6", 0]}
    sampling = {"seed": 0, "steps": 20, "cfg": 2.0, "denoise": 1.0}
    solver = {"sampler_name": "euler", "scheduler": "simple"}
    model = {"model_name": f"flowcore-{architecture}-demo.safetensors", "weight_dtype": "default"}
    saved = {"images": ["8", 0], "filename_prefix": f"flowcore/{architecture}"}
    return Workflow(
        name=architecture + TEXT_TO_IMAGE,
        nodes={
            "1": Placed("FlowCoreLoadModel", model, (40, 80, 340, 102)),
            "2": Placed("FlowCoreLoadTextEncoder", text, (40, 230, 340, 82)),
            "3": Placed(
                "FlowCoreLoadVAE", {"vae_name": "flowcore-scenes-vae.safetensors"}, (40, 360, 340, 58)
            ),
            "4": Placed("CLIPTextEncode", {"clip": ["2", 0], "text": CAPTION}, (440, 80, 400, 150), "Prompt"),
            "5": Placed(
                "CLIPTextEncode", {"clip": ["2", 0], "text": ""}, (440, 280, 400, 150), "Negative prompt"
            ),
            "6": Placed("FlowCoreEmptyLatent", size, (440, 480, 400, 150)),
            "7": Placed("KSampler", {**links, **sampling, **solver}, (900, 80, 300, 550)),
            "8": Placed("VAEDecode", {"samples": ["7", 0], "vae": ["3", 0]}, (1260, 80, 300, 46)),
            "9": Placed("SaveImage", saved, (1260, 180, 300, 450)),
        },
        groups={
            "Models": (20, 0, 380, 440),
            "Prompt and size": (420, 0, 440, 650),
            "Sampling": (880, 0, 700, 650),
        },
        note=_note("text_to_image").format(title=facts.title, files=facts.files),
    )


def flux_sequences() -> Workflow:
    """From the frequencies of a curve to its points, on a model that the user trains in minutes."""
    links = {"model": ["1", 0], "positive": ["3", 0], "negative": ["3", 1], "latent_image": ["4", 0]}
    sampling = {"seed": 0, "steps": 20, "cfg": 1.0, "denoise": 1.0}
    solver = {"sampler_name": "euler", "scheduler": "simple"}
    model = {"model_name": CURVES_FILE, "weight_dtype": "default"}
    made = {"model": ["1", 0], "samples": ["5", 0]}
    shown = {"model": ["1", 0], "samples": ["10", 0], "size": 512}
    saved = {"images": ["6", 0], "filename_prefix": "flowcore/curve"}
    return Workflow(
        name="flux_sequences",
        nodes={
            "1": Placed("FlowCoreLoadSequences", model, (40, 80, 340, 102)),
            "2": Placed(
                "PrimitiveStringMultiline", {"value": heart()}, (40, 240, 340, 400), "Points of a curve"
            ),
            "3": Placed(
                "FlowCoreSequenceConditioning", {"model": ["1", 0], "numbers": ["2", 0]}, (440, 80, 340, 140)
            ),
            "4": Placed("FlowCoreEmptySequence", {"model": ["1", 0], "batch_size": 1}, (440, 280, 340, 82)),
            "5": Placed("KSampler", {**links, **sampling, **solver}, (840, 80, 300, 262)),
            "6": Placed("FlowCoreSequencePreview", {**made, "size": 512}, (1200, 80, 300, 82)),
            "7": Placed("SaveImage", saved, (1200, 220, 300, 330), "Result"),
            "8": Placed("FlowCoreSequenceDecode", made, (840, 400, 300, 66)),
            "9": Placed("PreviewAny", {"source": ["8", 0]}, (840, 520, 300, 120), "Points of the result"),
            "10": Placed(
                "FlowCoreSequenceEncode", {"model": ["1", 0], "numbers": ["2", 0]}, (440, 430, 340, 140)
            ),
            "11": Placed("FlowCoreSequencePreview", shown, (1560, 80, 300, 82)),
            "12": Placed("PreviewImage", {"images": ["11", 0]}, (1560, 220, 300, 330), "Truth"),
        },
        groups={
            "Model and curve": (20, 0, 380, 660),
            "Condition, and the truth": (420, 0, 380, 660),
            "Sampling": (820, 0, 340, 660),
            "Result beside the truth": (1180, 0, 700, 660),
        },
        note=_note("flux_sequences"),
        is_ready=False,
    )


def heart() -> str:
    """Return 24 points of a closed curve of three harmonics, a point a line."""
    lines = []
    for index in range(24):
        s = 2 * math.pi * index / 24
        x = 12 * math.sin(s) - 4 * math.sin(3 * s)
        y = 13 * math.cos(s) - 5 * math.cos(2 * s) - 2 * math.cos(3 * s)
        lines.append(f"{0.07 * x:.3f} {0.07 * y:.3f}")
    return "\n".join(lines)


def _note(name: str) -> str:
    """Return a text of `notes/`."""
    return (Path(__file__).parent / "notes" / f"{name}.md").read_text(encoding="utf-8")


def demo_architectures() -> list[str]:
    """The architectures of graphs whose demo models are bundled."""
    return [architecture for architecture in FACTS if f"{architecture}-demo" in list_builtin()]


def bundled() -> dict[str, Workflow]:
    """All workflows by name; those from text to image where the demo model is bundled."""
    found = [*(text_to_image(architecture) for architecture in demo_architectures()), flux_sequences()]
    return {workflow.name: workflow for workflow in found}
