"""Pictures on the way in and out: files, tensors, masks, and the settings that a PNG file carries."""

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageOps, PngImagePlugin, UnidentifiedImageError
from torch import Tensor

from .errors import ConfigError, FlowCoreError

SETTINGS_KEY = "flowcore"
"""Name of the PNG text that holds the settings, as JSON."""


class WriteError(FlowCoreError):
    """A result could not be written."""


def read_image(path: str | Path) -> Image.Image:
    """Return the picture of a file, upright and fully decoded.

    Raises: ConfigError if there is no such file, or it does not decode.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise ConfigError(f"image must be an existing file, got {str(path)!r}")
    try:
        with Image.open(file) as image:
            return ImageOps.exif_transpose(image)
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError, SyntaxError, ValueError) as err:
        raise ConfigError(f"image {file} must decode, got {err}; save it again as PNG or JPEG") from err


def image_to_tensor(image: Image.Image, width: int, height: int) -> Tensor:
    """Return the picture, resized to width x height pixels, as `1 3 height width` in [-1, 1]."""
    pixels = np.array(image.convert("RGB").resize((width, height), Image.Resampling.LANCZOS))
    return rearrange(torch.from_numpy(pixels), "h w c -> 1 c h w").float() / 127.5 - 1


def mask_to_tensor(mask: Image.Image, columns: int, rows: int) -> Tensor:
    """Return the mask averaged over each latent cell, as `1 1 rows columns` in [0, 1]; white = generate."""
    cells = np.array(mask.convert("L").resize((columns, rows), Image.Resampling.BOX))
    return rearrange(torch.from_numpy(cells), "h w -> 1 1 h w").float() / 255


def tensor_to_images(images: Tensor) -> list[Image.Image]:
    """Return pictures of `b 3 height width` in [-1, 1]."""
    pixels = ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    arrays = rearrange(pixels, "b c h w -> b h w c").cpu().numpy()
    return [Image.fromarray(array) for array in arrays]


def save_image(image: Image.Image, path: str | Path) -> Path:
    """Write a PNG file, with the settings of a picture that FlowCore made; return its path.

    An earlier file is replaced in one step; the folder is made.
    Raises: ConfigError if the name does not end in .png; WriteError if the file cannot be written.
    """
    target = png_path(path)
    text = PngImagePlugin.PngInfo()
    if SETTINGS_KEY in image.info:
        text.add_itxt(SETTINGS_KEY, image.info[SETTINGS_KEY])
    partial = target.with_name(f".tmp-{os.getpid()}-{target.name}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        image.save(partial, format="PNG", pnginfo=text)
        partial.replace(target)
    except OSError as err:
        raise WriteError(
            f"{target} must be writable, got {err.strerror or err}; choose another path"
        ) from err
    finally:
        with contextlib.suppress(OSError):  # the folder may be no folder
            partial.unlink(missing_ok=True)
    return target


def png_path(path: str | Path) -> Path:
    """Return the path of a PNG file; ConfigError for another ending: others cannot hold the settings."""
    target = Path(path).expanduser()
    if target.suffix.lower() != ".png":
        raise ConfigError(f"the output must end in .png, which keeps the settings, got {str(path)!r}")
    return target


def add_settings(image: Image.Image, settings: Mapping[str, Any]) -> None:
    """Attach settings to the picture, beside those it has, for `save_image`; None values are left out."""
    present = json.loads(image.info.get(SETTINGS_KEY, "{}"))
    given = {name: value for name, value in settings.items() if value is not None}
    image.info[SETTINGS_KEY] = json.dumps({**present, **given}, ensure_ascii=False)


def read_settings(path: str | Path) -> dict[str, Any]:
    """Return the settings in a PNG file that FlowCore wrote.

    Raises: ConfigError if the file has none.
    """
    text = read_image(path).info.get(SETTINGS_KEY)
    if text is None:
        raise ConfigError(f"{path} must be a picture that FlowCore saved, got one without settings")
    settings: dict[str, Any] = json.loads(text)
    return settings
