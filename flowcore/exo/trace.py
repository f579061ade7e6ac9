"""What a run of Exo leaves besides the picture: the masks of its steps, and how long its stages took."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from PIL import Image
from torch import Tensor

from ..models.exo import StepResult
from ..models.exo.grids import memory_grid
from .masks import late_level, on_latents, on_pixels, stretch


@dataclass(frozen=True, slots=True, kw_only=True)
class ExoInfo:
    """What a picture's run left.

    mask: where it edits, `1 hm wm` in 0..1, a value for each memory cell: the mean over the steps below level
    0.5, or that of the last step. sparse_mask: the same with what was not selected as 0. iteration_masks: for
    each iteration, `t hm wm`. size: rows and columns of the latents; downscale: pixels on a side of a latent.
    timings: seconds of each stage, for the whole batch. seed: of the noise. prompt: what was drawn, as the
    model has rewritten it if it did.
    """

    mask: Tensor
    sparse_mask: Tensor
    iteration_masks: Tensor
    size: tuple[int, int]
    downscale: int
    timings: dict[str, float]
    seed: int
    prompt: str

    def on_pixels(self, mask: Tensor | None = None, mode: str = "bilinear") -> Tensor:
        """Return one of the masks, by default `mask`, on the pixels of the picture, `n y x` in 0..1."""
        return on_pixels(self.mask if mask is None else mask, self.size, self.downscale, mode)

    def mask_image(self, mode: str = "bilinear") -> Image.Image:
        """Return the mask as a gray picture of the size of the picture, white = edited."""
        gray = (self.on_pixels(mode=mode)[0] * 255).round().to(torch.uint8)
        return Image.fromarray(gray.numpy(), mode="L")


@dataclass(slots=True)
class Trace:
    """The masks of one run of a batch, in the order of its calls, and the seconds of its stages.

    calls: (level, masks `b t n`, sparse masks `b t n`), float32.
    """

    device: torch.device
    calls: list[tuple[float, Tensor, Tensor]] = field(default_factory=list)
    timings: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add the seconds of a stage."""
        self._wait()
        start = time.perf_counter()
        yield
        self._wait()
        self.timings[stage] = self.timings.get(stage, 0.0) + time.perf_counter() - start

    def record(self, result: StepResult, count: int) -> None:
        """Take the masks of a call, of its first samples: those with the prompt."""
        masks = torch.stack([edit.mask for edit in result.iterations], dim=1)
        sparse = torch.stack([edit.sparse() for edit in result.iterations], dim=1)
        self.calls.append((float(result.time[0]), masks[:count], sparse[:count]))

    def last_stretched(self, size: tuple[int, int]) -> Tensor:
        """Return the mask of the last call with more contrast, on latents of a size, `b 1 h w`."""
        mask = self.calls[-1][1][:, -1].unflatten(1, memory_grid(*size))
        return on_latents(stretch(mask), size)

    def infos(
        self, size: tuple[int, int], downscale: int, seeds: Sequence[int], prompts: Sequence[str]
    ) -> list[ExoInfo]:
        """Return what each picture's run left."""
        start = late_level([call[0] for call in self.calls])
        late = [call for call in self.calls if call[0] <= start]
        masks, sparse = (
            torch.stack(parts).mean(dim=0).unflatten(2, memory_grid(*size)).cpu()
            for parts in ([call[1] for call in late], [call[2] for call in late])
        )  # b t hm wm
        return [
            ExoInfo(
                mask=masks[row, -1:],
                sparse_mask=sparse[row, -1:],
                iteration_masks=masks[row],
                size=size,
                downscale=downscale,
                timings=self.timings,
                seed=seed,
                prompt=prompt,
            )
            for row, (seed, prompt) in enumerate(zip(seeds, prompts, strict=True))
        ]

    def _wait(self) -> None:
        """Wait for the device, so that the clock shows its work, too."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
