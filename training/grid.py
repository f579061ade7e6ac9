"""Pictures side by side in one file."""

from __future__ import annotations

from pathlib import Path

from einops import rearrange
from PIL import Image
from torch import Tensor
from torch.nn import functional


def save_grid(images: Tensor, path: Path, columns: int) -> None:
    """Writes `images` (`n 3 h w`, [-1, 1]) as one PNG, row by row, with a grey line between them."""
    rows = -(-len(images) // columns)
    padded = functional.pad(images.clamp(-1, 1), (0, 2, 0, 2))
    padded = functional.pad(padded, (0, 0, 0, 0, 0, 0, 0, rows * columns - len(images)))
    grid = rearrange(padded, "(r n) c h w -> (r h) (n w) c", r=rows)
    pixels = grid.add(1).mul(127.5).round().byte().cpu().numpy()
    aside = path.with_name(f".tmp-{path.name}")
    Image.fromarray(pixels).save(aside, format="PNG")
    aside.replace(path)
