"""Encoded images to PIL images or pixels: any mode to grey or RGB, upright, or a BadImage that says why not."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image as PILImage
    from torch import Tensor

Shrink = Callable[[int, int], int]  # width and height to 1, 2, 4 or 8: how much smaller a JPEG may be decoded

MAX_PIXELS = 178_956_970  # where PIL itself refuses; checked here too, because a library may have lifted PIL's limit
GREY_MODES = ("1", "L", "I;16", "I;16L", "I;16B", "I;16N", "I", "F")
ORIENTATION = 0x0112  # the Exif tag


class BadImage(ValueError):
    """An image that cannot be read; the message says what is wrong with it."""


def decode_pixels(encoded: bytes, channels: int, shrink: Shrink | None = None) -> Tensor:
    """What decode_image decodes, as uint8 [channels, H, W], of any strides. Raises BadImage."""
    return pixels_of(decode_image(encoded, channels, shrink))


def pixels_of(image: PILImage) -> Tensor:
    """The pixels of an image in mode "L" or "RGB"; uint8 [C, H, W]."""
    import torch

    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.view(image.height, image.width, -1).permute(2, 0, 1)


def decode_image(encoded: bytes, channels: int, shrink: Shrink | None = None) -> PILImage:
    """The image in mode "L" (channels 1) or "RGB" (channels 3), uint8, turned as its Exif orientation says.

    Transparency is composited over white, as a page shows it. 16-bit grey is divided by 257 (65535 becomes 255), not
    clipped; a float image within 0..1 is scaled by 255, else its levels are taken as 0..255. Of an animation the first
    frame counts. A JPEG is decoded smaller by the factor that shrink returns for its size, which takes less time.
    Raises BadImage for what is empty, truncated, too large or no image.
    """
    from PIL import Image, ImageOps

    if not encoded:
        raise BadImage("The image is empty (0 bytes).")
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            _check_pixels(*image.size)
            if shrink is not None:
                factor = shrink(*image.size)
                image.draft(None, (image.width // factor, image.height // factor))
            image.load()
            if "exif" in image.info and image.getexif().get(ORIENTATION, 1) != 1:  # TIFF: PIL has turned it in load()
                return _to_mode(ImageOps.exif_transpose(image), channels)
            return _to_mode(image, channels)
    except _decode_errors() as error:
        raise BadImage(f"Cannot decode an image of {len(encoded)} bytes: {_reason(error)}") from error


def image_header(encoded: bytes) -> tuple[int, int, str]:
    """Width, height and PIL mode, without decoding the pixels. Raises BadImage."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(encoded)) as image:
            return image.width, image.height, image.mode
    except _decode_errors() as error:
        raise BadImage(f"Cannot read the header of an image of {len(encoded)} bytes: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """The error's words as the end of a sentence; without the address in memory that Pillow names."""
    from PIL import UnidentifiedImageError

    return "cannot identify its format." if isinstance(error, UnidentifiedImageError) else f"{str(error).rstrip('.')}."


def _decode_errors() -> tuple[type[Exception], ...]:
    """What PIL and its format readers raise on bytes that are broken, cut short or too large."""
    from PIL import Image

    return (OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error, Image.DecompressionBombError)


def _check_pixels(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise ValueError(f"{width} x {height} pixels are more than the limit of {MAX_PIXELS}.")


def _to_mode(image: PILImage, channels: int) -> PILImage:
    """A decoded image of any mode as "L" or "RGB"."""
    from PIL import Image

    wanted = "L" if channels == 1 else "RGB"
    if image.mode == wanted and "transparency" not in image.info:
        return image
    if image.mode in GREY_MODES[2:]:
        image = Image.fromarray(_grey_levels(np.asarray(image)))
    elif image.has_transparency_data:
        page = Image.new("RGBA", image.size, "white")
        page.alpha_composite(image.convert("RGBA"))
        image = page
    elif image.mode not in ("1", "L", "RGB"):
        image = image.convert("RGB")
    return image if image.mode == wanted else image.convert(wanted)


def _grey_levels(values: np.ndarray) -> np.ndarray:
    """16-bit, 32-bit or float grey values as uint8 levels of the same shape."""
    if not np.isfinite(values).all():
        raise ValueError("the float image holds NaN or infinite values.")
    low, high = values.min(), values.max()
    is_float = values.dtype.kind == "f"
    limit = 255 if is_float else 65535
    if low < 0 or high > limit:
        raise ValueError(f"grey values from {low} to {high} lie outside 0..{limit}.")
    scale = 255.0 if is_float and high <= 1 else 1.0 if is_float else 1 / 257
    return np.rint(values * scale).astype(np.uint8)
