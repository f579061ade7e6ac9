"""Pictures side by side."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from training.grid import save_grid


def test_pictures_stand_row_by_row_with_lines_between(tmp_path: Path) -> None:
    images = torch.stack([torch.full((3, 4, 6), value) for value in (-1.0, 0.0, 1.0)])
    save_grid(images, tmp_path / "grid.png", columns=2)
    pixels = np.asarray(Image.open(tmp_path / "grid.png"))
    assert pixels.shape == (2 * 6, 2 * 8, 3)
    assert (pixels[0, 0] == 0).all()
    assert (pixels[0, 8] == 128).all()
    assert (pixels[6, 0] == 255).all()
    assert [path.name for path in tmp_path.iterdir()] == ["grid.png"]


def test_values_out_of_range_are_cut(tmp_path: Path) -> None:
    save_grid(torch.full((1, 3, 2, 2), 7.0), tmp_path / "grid.png", columns=1)
    assert np.asarray(Image.open(tmp_path / "grid.png"))[0, 0].tolist() == [255, 255, 255]
