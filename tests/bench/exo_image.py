"""A picture of Exo from prompt to pixels with random weights, and what its times are held against."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flowcore.exo.dry_run import Request, preset_plan
from flowcore.exo.memory_plan import weight_bytes
from flowcore.flow.guidance import guided_pair
from flowcore.flow.schedule import sigma_grid
from flowcore.flow.solvers import euler
from flowcore.models.exo import PRESETS, Exo, PrefixState
from flowcore.models.exo.trunk import build_trunk
from flowcore.vae.network import build_autoencoder
from tests.bench.cases import IMAGE, IMAGE_GUIDED, Case
from tests.bench.measure import count_gflop
from tests.bench.running import Row

STEPS, ITERATIONS, GUIDANCE, SHIFT = 20, 4, 4.0, 3.0
CLAIMED_SECONDS, CLAIMED_BYTES = 3.0, 32 * 10**9
"""What the description of Exo says of 1024 x 1024 pixels: on an A100, and in memory."""
FLOP_A_WEIGHT = 2
"""Of a pass through a matrix, for each token; attention comes on top."""


class Card(NamedTuple):
    """Peak operations and bytes a second."""

    flops: float
    bandwidth: float


CARDS = {
    "A100 80 GB": Card(312e12, 2.04e12),
    "H100 SXM": Card(989e12, 3.35e12),
    "H200": Card(989e12, 4.8e12),
    "RTX 5090": Card(209e12, 1.79e12),
}


@dataclass(frozen=True, kw_only=True)
class Work:
    """Operations of a picture, those of its passes over suffixes, which memory limits, and their bytes."""

    flop: float
    suffix_flop: float
    suffix_bytes: float


def roofline(work: Work, card: Card, *, of_flops: float = 1.0, of_bandwidth: float = 1.0) -> float:
    """Seconds of a picture at shares of a card's peaks: suffixes by bandwidth, the rest by operations."""
    rest = (work.flop - work.suffix_flop) / (of_flops * card.flops)
    return rest + work.suffix_bytes / (of_bandwidth * card.bandwidth)


def work_of_row(case: Case, gflop: float) -> Work:
    """What the passes over suffixes of a case do, beside the counted operations of all."""
    config, passes = PRESETS[case.preset], STEPS * ITERATIONS
    plan = preset_plan(case.preset, Request(dtype=case.dtype))
    read = weight_bytes(plan)["trunk, decoder layers"]
    tokens = passes * config.suffix_length * case.batch * (2 if case.what == IMAGE_GUIDED else 1)
    weights = read / torch.empty((), dtype=plan.dtype).element_size()
    return Work(
        flop=gflop * 1e9, suffix_flop=FLOP_A_WEIGHT * tokens * weights, suffix_bytes=float(passes * read)
    )


def notes(cases: Sequence[Case], rows: Sequence[Row]) -> list[str]:
    """Lines on the measured pictures: time and memory beside what is said of Exo, and the rooflines."""
    lines = []
    for case, row in zip(cases, rows, strict=True):
        if row.what not in (IMAGE, IMAGE_GUIDED) or row.gflops is None:
            continue
        work = work_of_row(case, row.gflops * row.seconds)
        lines += [
            f"{row.arch} {row.size}, {row.what}: measured {row.seconds:.3g} s and "
            f"{row.peak_mib * 2**20 / 1e9:.2f} GB; described at 8B: {CLAIMED_SECONDS:g} s on an A100, "
            f"{CLAIMED_BYTES / 1e9:g} GB",
            f"  {work.flop / 1e12:.3g} TFLOP, {work.suffix_bytes / 1e12:.3g} TB of weights for suffixes; "
            "roofline in seconds at all, and at half of the operations and three quarters of the bandwidth:",
            *(f"  {name:12}{_both(work, card)}" for name, card in CARDS.items()),
        ]
    return lines


def _both(work: Work, card: Card) -> str:
    likely = roofline(work, card, of_flops=0.5, of_bandwidth=0.75)
    return f"{roofline(work, card):8.3g}{likely:8.3g}"


def image_gflop(work: Callable[[int], object]) -> float:
    """10^9 operations of a picture by `image_work`, from two short ones: counting all steps takes minutes."""
    first, second = (count_gflop(partial(work, steps)) for steps in (1, 2))
    return first + (STEPS - 1) * (second - first)


def image_work(case: Case, device: str) -> Callable[..., object]:
    """A call that makes a picture: the prompt is read, 20 steps of 4 refinements, the autoencoder decodes.

    It takes other numbers of steps.
    """
    dtype, config = getattr(torch, case.dtype), PRESETS[case.preset]
    torch.manual_seed(0)
    model = Exo(config, device=device, dtype=dtype).eval()
    if model.trunk is None:
        model.attach(build_trunk(config.trunk, device=device, dtype=dtype).eval())
    autoencoder: Any = build_autoencoder(_vae_config(config.latent_channels), device=device).to(dtype).eval()
    ids = torch.randint(97, 122, (case.batch, case.text), device=device)
    noise = torch.randn(case.batch, config.latent_channels, *case.shape, device=device, dtype=dtype)
    scale = GUIDANCE if case.what == IMAGE_GUIDED else 1.0
    texts = torch.cat((ids, ids.flip(1))) if case.what == IMAGE_GUIDED else ids

    def velocity(x: Tensor, sigma: Tensor, prefix: PrefixState) -> Tensor:
        return model.step(x.to(dtype), sigma, prefix, iterations=ITERATIONS).velocity

    @torch.inference_mode()
    def run(steps: int = STEPS) -> object:
        both = model.encode(texts, size=(case.shape[0], case.shape[1]), dtype=dtype)

        def pair(x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
            first, second = velocity(torch.cat((x, x)), torch.cat((sigma, sigma)), both).chunk(2)
            return first, second

        guided = guided_pair(pair, lambda x, sigma: velocity(x, sigma, both.rows(0, case.batch)), scale)
        latents = euler(guided, noise, sigma_grid(steps, SHIFT))
        return autoencoder.decode(latents).sample

    return run


def _vae_config(channels: int) -> dict[str, Any]:
    """The settings of an autoencoder: FLUX.2's for its channels, else a small one of 8 times."""
    is_published = channels == 128
    return {
        "block_out_channels": [128, 256, 512, 512] if is_published else [16, 32, 64, 64],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "layers_per_block": 2,
        "norm_num_groups": 32 if is_published else 16,
        "latent_channels": 32 if is_published else channels,
        **({"batch_norm_eps": 1e-4} if is_published else {}),
    }
