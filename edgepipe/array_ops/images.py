"""Pictures: file bytes to arrays of the size, colour order and layout a model wants."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, UnidentifiedImageError

from edgepipe.data import ImagePreprocess
from edgepipe.errors import DataError

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".ppm", ".pgm", ".tif", ".tiff")
_FILTERS = {
    "bilinear": Image.Resampling.BILINEAR,
    "nearest": Image.Resampling.NEAREST,
    "bicubic": Image.Resampling.BICUBIC,
}


def prepare_image(content: bytes, options: ImagePreprocess, *, where: str) -> np.ndarray:
    """The bytes of one picture -> uint8, (channels, height, width) or (height, width, channels).

    ``size`` is (height, width); Pillow's antialiasing filter is used where the picture shrinks.
    Bytes that are no picture, or a truncated one, are a DataError naming ``where``.
    """
    height, width = options.size
    try:
        with Image.open(io.BytesIO(content)) as picture:
            if picture.mode.startswith(("I", "F")):
                # Pillow would cut every value above 255 to white
                raise DataError(
                    f"{where} has more than 8 bits a channel (mode {picture.mode})",
                    hint="save it with 8 bits, or give the values as they are: .npz or a function",
                    code="unreadable-sample",
                )
            converted = picture.convert("L" if options.color == "gray" else "RGB")
            resized = converted.resize((width, height), _FILTERS[options.resize])
    except (
        UnidentifiedImageError,
        Image.DecompressionBombError,
        OSError,
        ValueError,
        SyntaxError,  # what Pillow raises for a broken PNG chunk
    ) as exc:
        raise DataError(
            f"{where} is not a readable image: {exc}",
            hint="remove the file, or save it again as PNG or JPEG",
            code="unreadable-sample",
        ) from exc
    pixels = np.asarray(resized, dtype=np.uint8)
    if options.color == "gray":
        pixels = pixels[:, :, None]  # (H, W) -> (H, W, 1)
    elif options.color == "bgr":
        pixels = pixels[:, :, ::-1]
    return pixels.transpose(2, 0, 1) if options.layout == "CHW" else pixels
