"""What a set of trajectories will take: bytes by its shapes, hours by its operations."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from flowcore.vae.latent_spec import LatentSpec
from training.trajectories.store import SHARD_RECORDS

BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Counts, bytes, floating-point operations and hours; operations and hours without encoders."""

    records: int
    captions: int
    width: int
    height: int
    latents: tuple[int, int, int]
    record_bytes: int
    total_bytes: int
    shards: int
    record_flops: float
    tflops: float
    hours: float

    def to_dict(self) -> dict[str, object]:
        """JSON-like values."""
        return asdict(self)

    def __str__(self) -> str:
        shape = " x ".join(map(str, self.latents))
        return "\n".join(
            [
                f"records: {self.records:,} of {self.width}x{self.height} pixels, latents {shape}, "
                f"{self.captions:,} distinct captions",
                f"size: {self.record_bytes / 1e6:.3f} MB a record, {self.total_bytes / 1e9:.2f} GB in "
                f"{self.shards:,} shards",
                f"work: {self.record_flops / 1e12:,.4g} TFLOP a record, {self.hours:,.4g} hours at "
                f"{self.tflops:,.4g} TFLOP/s",
            ]
        )


def make_plan(
    *,
    count: int,
    captions: int,
    size: tuple[int, int],
    space: LatentSpec,
    dtype: str,
    flops: float,
    tflops: float,
    tensors: int = 1,
) -> Plan:
    """The plan of `count` records of so many tensors; flops of one; tflops: 10^12 operations a second."""
    width, height = size
    shape = (space.channels, height // space.downscale, width // space.downscale)
    record_bytes = tensors * shape[0] * shape[1] * shape[2] * BYTES[dtype]
    return Plan(
        records=count,
        captions=captions,
        width=width,
        height=height,
        latents=shape,
        record_bytes=record_bytes,
        total_bytes=record_bytes * count,
        shards=-(-count // SHARD_RECORDS),
        record_flops=flops,
        tflops=tflops,
        hours=flops * count / (tflops * 1e12) / 3600,
    )
