"""A process that holds one model and times it when told to; started by `tests.bench.__main__`.

The first line of its input is a job, every further line asks for one measurement; answers are JSON lines.
Two workers at a time, this project's and the original's, take turns, so that both meet the same machine.
"""

import gc
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from flowcore.flow.guidance import guided_pair
from flowcore.flow.schedule import sigma_grid
from flowcore.flow.solvers import euler
from tests.bench.cases import BACKWARD, FORWARD, IMAGE, IMAGE_GUIDED, KEPT, LAYERS, LOAD, SAMPLE, Job
from tests.bench.exo_image import image_gflop, image_work
from tests.bench.exo_layer import layer_work
from tests.bench.exo_speed import speed_work
from tests.bench.measure import count_gflop, peak_mib, reset_peak, square_product, timed
from tests.bench.subjects import Inputs, Subject, inputs_of, own_subject, reference_subject

GUIDANCE = 3.0
STEPS = 20
PRODUCTS = {"cpu": 2, "cuda": 50}
"""Matrix products timed together before and after every measurement."""


def work_of(job: Job, folder: Path) -> Callable[[], object]:
    """The call that is timed. folder: for files."""
    case, device = job.case, job.device
    if case.what in (IMAGE, IMAGE_GUIDED):
        return image_work(case, device)
    if case.what in LAYERS:
        return layer_work(case, device)
    if case.what in KEPT:
        return speed_work(case)
    if job.reference is None:
        subject = own_subject(case, device)
    else:
        subject = reference_subject(case, device, job.reference[0], Path(job.reference[1]))
    if case.what == LOAD:
        return loading(subject, folder / "model.safetensors")
    inputs = inputs_of(case, device)
    module = subject.build()
    if case.what in (FORWARD, SAMPLE):
        return (sampling if case.what == SAMPLE else forward)(subject, module.eval(), inputs)
    return training(subject, module.train(), inputs, has_optimizer=case.what != BACKWARD)


def loading(subject: Subject, path: Path) -> Callable[[], object]:
    """Building a model with the weights of a file, which lies in the system's cache."""
    subject.save(subject.build(), path)
    return lambda: subject.load(path)


def forward(subject: Subject, module: torch.nn.Module, inputs: Inputs) -> Callable[[], object]:
    """One call without gradients."""

    @torch.inference_mode()
    def run() -> object:
        return subject.call(module, inputs.latents, inputs.sigma, inputs.conditioning)

    return run


def sampling(subject: Subject, module: torch.nn.Module, inputs: Inputs) -> Callable[[], object]:
    """STEPS steps of Euler, both predictions of the guidance from one call."""
    both = inputs.doubled()

    def pair(x: torch.Tensor, sigma: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        first, second = subject.call(module, torch.cat((x, x)), torch.cat((sigma, sigma)), both).chunk(2)
        return first, second

    velocity = guided_pair(pair, lambda x, sigma: pair(x, sigma)[0], GUIDANCE)

    @torch.inference_mode()
    def run() -> object:
        return euler(velocity, inputs.latents, sigma_grid(STEPS))

    return run


def training(
    subject: Subject, module: torch.nn.Module, inputs: Inputs, *, has_optimizer: bool
) -> Callable[[], object]:
    """Forward, mean squared error, backward, and a step of AdamW if there is one."""
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-6, fused=True)

    def run() -> object:
        output = subject.call(module, inputs.latents, inputs.sigma, inputs.conditioning)
        functional.mse_loss(output.float(), torch.zeros_like(output, dtype=torch.float32)).backward()
        if has_optimizer:
            optimizer.step()
        return optimizer.zero_grad()

    return run


def serve(job: Job, answer: Callable[[dict[str, Any]], None]) -> None:
    """Warm up, then measure once for every line of input."""
    product = square_product(job.case.dtype, job.device)
    count = PRODUCTS[job.device]

    def products() -> None:
        for _ in range(count):
            product()

    with tempfile.TemporaryDirectory() as folder:
        work = work_of(job, Path(folder))
        gc.collect()
        reset_peak(job.device)
        # the first of the calls to warm up
        gflop = image_gflop(work) if job.case.what in (IMAGE, IMAGE_GUIDED) else count_gflop(work)
        work()
        products()
        answer({"gflop": gflop})
        for _ in sys.stdin:
            before = timed(products, job.device)
            seconds = timed(work, job.device)
            after = timed(products, job.device)
            answer(
                {
                    "seconds": seconds,
                    "product_seconds": (before + after) / (2 * count),
                    "peak_mib": peak_mib(job.device),
                }
            )


def main() -> None:
    """Take the job from the first line; whatever code prints meanwhile goes to stderr."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def answer(values: dict[str, Any]) -> None:
        print(json.dumps(values), file=answers, flush=True)

    serve(Job.from_json(sys.stdin.readline()), answer)


if __name__ == "__main__":
    main()
