"""What is measured: one `Case` a row, in three suites. Standard library only: the parent starts at once."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple

LOAD, FORWARD, TRAIN, SAMPLE = "load", "forward", "train step", "sample 20 steps guided"
BACKWARD = "forward and backward"
"""A train step without its optimizer, for the memory of the activations."""
CHECKPOINTED = "train step checkpointed"
"""As TRAIN, with every block computed again in the backward pass."""
IMAGE, IMAGE_GUIDED = "image 20 steps", "image 20 steps guided"
"""From prompt to pixels, as exo's pipeline goes: the prompt read once, 4 refinements a step, decoded."""
READ, SUFFIX = "weights read", "suffix, one layer"
ALL_TOKENS, HEAD_BLOCK = "all tokens, one layer", "head block"
"""One layer of exo: as many bytes as its weights; an iteration's suffix; prompt and suffix; the head."""
LAYERS = (READ, SUFFIX, ALL_TOKENS, HEAD_BLOCK)
KEPT = PROMPT, STEP, STEP_AGAIN = "prompt read", "step, past kept", "step, all tokens again"
"""What a run of exo consists of, and a step without what it keeps."""
KINDS = (LOAD, FORWARD, BACKWARD, TRAIN, CHECKPOINTED, SAMPLE, IMAGE, IMAGE_GUIDED, *LAYERS, *KEPT)

PRODUCT_SIDE = 1024
PRODUCT_FLOP = 2 * PRODUCT_SIDE**3
"""The matrix product that speeds are compared with: two square matrices."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One row. shape: of the latents without batch and channels, `h w`, or `n` tokens of a sequence."""

    arch: str
    preset: str
    shape: tuple[int, ...]
    text: int
    batch: int = 1
    what: str = FORWARD
    dtype: str = "float32"
    overrides: Mapping[str, Any] = field(default_factory=dict)

    @property
    def size(self) -> str:
        """Preset, what differs from it, latents and text tokens."""
        changes = "".join(f" {name}={value}" for name, value in self.overrides.items())
        return f"{self.preset}{changes} {'x'.join(map(str, self.shape))} + {self.text}"


class Job(NamedTuple):
    """What a worker measures. reference: name and folder of the original, None = this project's model."""

    case: Case
    device: str = "cpu"
    reference: tuple[str, str] | None = None

    def to_json(self) -> str:
        """One line of JSON."""
        return json.dumps(self._asdict() | {"case": asdict(self.case)})

    @classmethod
    def from_json(cls, line: str) -> "Job":
        """The inverse of `to_json`."""
        values = json.loads(line)
        case = values["case"]
        return cls(Case(**{**case, "shape": tuple(case["shape"])}), values["device"], values["reference"])


# One size of each architecture for every kind of row.
SIZES = (
    Case(arch="xut", preset="xut-small", shape=(32, 32), text=64, batch=4),
    Case(arch="flux", preset="readme", shape=(1024,), text=1024, batch=2),
    Case(arch="tinyflux", preset="tinyflux-deep", shape=(32, 32), text=128),
    Case(arch="single_stream", preset="v3-384", shape=(56, 56), text=128, batch=2),
)
# Further sizes of which only a forward is measured.
FORWARDS = (
    Case(arch="xut", preset="xut-small", shape=(32, 32), text=64),
    Case(  # a pair of FLUX.1's blocks at 1024 px
        arch="flux",
        preset="flux-schnell",
        overrides={"depth": 1, "depth_single_blocks": 1},
        shape=(128, 128),
        text=512,
        dtype="bfloat16",
    ),
    Case(arch="exo", preset="tiny", shape=(32, 32), text=64),
)
# Pictures of exo, on a CPU with the sizes of the demo.
IMAGES = {
    "gpu": Case(arch="exo", preset="8b", shape=(64, 64), text=320),
    "cpu": Case(arch="exo", preset="demo", shape=(16, 16), text=64),
}
# Exo's training, and one layer of the large one.
EXO_TRAINED = Case(arch="exo", preset="demo", shape=(16, 16), text=24, batch=8)
EXO_LAYER = Case(arch="exo", preset="8b", shape=(32, 32), text=320, dtype="bfloat16")
EXO_TRUNKS = tuple(
    Case(arch="exo", preset=f"trunk-{trunk}", shape=(4, 4), text=256) for trunk in ("512x12", "256x8")
)
# The large models' widths in fewer blocks and tokens: two minutes in all, and yet the matrices take the time.
SMOKE = (
    Case(arch="xut", preset="xut-small", overrides={"depth": 1}, shape=(24, 24), text=64),
    Case(
        arch="flux",
        preset="readme",
        overrides={"depth": 1, "depth_single_blocks": 1},
        shape=(128,),
        text=128,
    ),
    Case(
        arch="tinyflux",
        preset="tinyflux-deep",
        overrides={"num_double_layers": 2, "num_single_layers": 4},
        shape=(12, 12),
        text=64,
    ),
    Case(
        arch="single_stream",
        preset="v3-384",
        overrides={"depth": 3, "refiner_depth": 1},
        shape=(32, 32),
        text=64,
    ),
    Case(arch="exo", preset="small", shape=(16, 16), text=64),
)


def suite(name: str) -> tuple[Case, ...]:
    """The rows of a suite: `cpu`, `gpu` or `smoke`."""
    if name == "smoke":
        return SMOKE
    # Guided sampling of the large sizes takes a CPU many minutes: there it is measured on the demo models.
    sampled = [replace(case, preset="demo", shape=(16, 16), text=64, batch=1) for case in SIZES]
    rows = [
        *(replace(case, what=LOAD, batch=1) for case in (*SIZES, FORWARDS[-1])),
        *SIZES,
        *FORWARDS,
        *(
            replace(case, what=what)
            for case in (*SIZES, EXO_TRAINED)
            for what in (BACKWARD, TRAIN, CHECKPOINTED)
        ),
        *(replace(case, what=SAMPLE) for case in (SIZES if name == "gpu" else sampled)),
        *(replace(IMAGES[name], what=what) for what in (IMAGE, IMAGE_GUIDED)),
        *(replace(EXO_LAYER, what=what) for what in LAYERS),
        *(replace(case, what=what) for case in EXO_TRUNKS for what in KEPT if name == "cpu"),
    ]
    return tuple(replace(case, dtype="bfloat16") for case in rows) if name == "gpu" else tuple(rows)
