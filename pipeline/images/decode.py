"""Decodes images to PIL images or pixels: converts any mode to grey or RGB and applies the Exif orientation."""

from __future__ import annotations

import io
import struct
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image as PILImage
    from PIL.Image import Transpose
    from torch import Tensor

Shrink = Callable[[int, int], int]  # maps width and height to the factor (1, 2, 4, 8) by which to decode a JPEG smaller

MAX_PIXELS = 178_956_970  # PIL's own limit; checked here too, because a library may have raised PIL's
GREY_MODES = ("1", "L", "I;16", "I;16L", "I;16B", "I;16N", "I", "F")
DEEP_GREY_MODES = GREY_MODES[2:-1]  # integer modes of more than 8 bits
GREY_MAX = 65535  # of 16 bits
ORIENTATION = 0x0112  # the Exif tag
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
PIXEL_CHUNKS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND", b"acTL", b"fcTL", b"fdAT", b"eXIf")

Read = TypeVar("Read")

# Pillow warns of each damaged Exif entry, for every image and in every worker; only the orientation is used.
warnings.filterwarnings("ignore", "Corrupt EXIF data|Truncated File Read", UserWarning, "PIL")


class BadImage(ValueError):
    """An image cannot be read. The message contains the reason."""


def decode_pixels(encoded: bytes, channels: int, shrink: Shrink | None = None, grey_max: int = GREY_MAX) -> Tensor:
    """Like decode_image, but returns uint8 [channels, H, W] with any strides. Raises BadImage."""
    return pixels_of(decode_image(encoded, channels, shrink, grey_max))


def pixels_of(image: PILImage) -> Tensor:
    """The pixels of an image in mode "L" or "RGB"; uint8 [C, H, W]."""
    import torch

    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.view(image.height, image.width, -1).permute(2, 0, 1)


def decode_image(encoded: bytes, channels: int, shrink: Shrink | None = None, grey_max: int = GREY_MAX) -> PILImage:
    """Decodes to mode "L" (channels 1) or "RGB" (channels 3), 8 bits, and applies the Exif orientation.

    Transparent images are composited over white. Of 16-bit grey, grey_max and what is above it become 255. A float image
    within 0..1 is scaled by 255; otherwise its values are treated as levels 0..255. Of an animation, the first frame is used.
    shrink: returns the factor by which to decode a JPEG of that size smaller, which is faster. Raises BadImage if the bytes are
    empty, truncated, too large or not an image.
    """
    from PIL import Image

    def decode(encoded: bytes) -> PILImage:
        with Image.open(io.BytesIO(encoded)) as image:
            _check_pixels(*image.size)
            if shrink is not None:
                factor = shrink(*image.size)
                image.draft(None, (image.width // factor, image.height // factor))
            image.load()
            turn = _turn(image) if "exif" in image.info else None  # for TIFF, load() has already applied it
            return _to_mode(image if turn is None else image.transpose(turn), channels, grey_max)

    if not encoded:
        raise BadImage("The image is empty (0 bytes).")
    try:
        return _despite_metadata(decode, encoded)
    except _decode_errors() as error:
        raise BadImage(f"Cannot decode an image of {len(encoded)} bytes: {_reason(error)}") from error


def image_header(encoded: bytes) -> tuple[int, int, str, bool]:
    """Width, height, PIL mode and whether a sample has 16 bits, without decoding the pixels. Raises BadImage."""
    from PIL import Image

    def read(encoded: bytes) -> tuple[int, int, str, bool]:
        with Image.open(io.BytesIO(encoded)) as image:
            is_deep = image.mode in DEEP_GREY_MODES or any(";16" in str(tile[3]) for tile in image.tile)
            return image.width, image.height, image.mode, is_deep

    return _from_header(read, encoded)


def file_kind(encoded: bytes) -> str:
    """Pillow's name of the file format, such as JPEG. Raises BadImage."""
    from PIL import Image

    def read(encoded: bytes) -> str:
        with Image.open(io.BytesIO(encoded)) as image:
            return str(image.format)

    return _from_header(read, encoded)


def _from_header(read: Callable[[bytes], Read], encoded: bytes) -> Read:
    """What `read` returns for the image without decoding its pixels. Raises BadImage."""
    try:
        return _despite_metadata(read, encoded)
    except _decode_errors() as error:
        raise BadImage(f"Cannot read the header of an image of {len(encoded)} bytes: {_reason(error)}") from error


def largest_value(encoded: bytes) -> int:
    """The largest value of an image as Pillow decodes it: up to 65535 of 16-bit grey, up to 255 of others. Raises BadImage."""
    from PIL import Image

    def read(encoded: bytes) -> int:
        with Image.open(io.BytesIO(encoded)) as image:
            return int(np.asarray(image).max())

    try:
        return _despite_metadata(read, encoded)
    except _decode_errors() as error:
        raise BadImage(f"Cannot decode an image of {len(encoded)} bytes: {_reason(error)}") from error


def _turn(image: PILImage) -> Transpose | None:
    """The transposition for the Exif orientation; None for an upright image or a damaged Exif block."""
    from PIL.Image import Transpose

    turns = {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }
    damage: tuple[type[Exception], ...] = (
        *_decode_errors(),
        TypeError,
        KeyError,
        AttributeError,
        ZeroDivisionError,
    )  # as Pillow's reader meets it
    try:
        return turns.get(image.getexif().get(ORIENTATION, 1))
    except damage:
        return None


def _despite_metadata(read: Callable[[bytes], Read], encoded: bytes) -> Read:
    """What `read` returns for the image; for a PNG that it cannot read, what it returns without the PNG's metadata.

    Pillow refuses a PNG with a large or damaged text or colour profile whose pixels are whole.
    """
    try:
        return read(encoded)
    except _decode_errors():
        if not encoded.startswith(PNG_SIGNATURE):
            raise
        return read(_without_metadata(encoded))


def _without_metadata(png: bytes) -> bytes:
    """The PNG with the chunks that its pixels need, and the rest from the first chunk on that is cut off."""
    kept, start = [PNG_SIGNATURE], len(PNG_SIGNATURE)
    while start + 12 <= len(png):
        length, kind = struct.unpack(">I4s", png[start : start + 8])
        stop = start + 12 + length
        if kind in PIXEL_CHUNKS or stop > len(png):
            kept.append(png[start:stop])
        start = stop
    return b"".join([*kept, png[start:]])


def _reason(error: Exception) -> str:
    """The message of the error as the end of a sentence, without the memory address that Pillow includes."""
    from PIL import UnidentifiedImageError

    return "cannot identify its format." if isinstance(error, UnidentifiedImageError) else f"{str(error).rstrip('.')}."


def _decode_errors() -> tuple[type[Exception], ...]:
    """The exceptions that PIL and its format readers raise for damaged, truncated or too large images."""
    from PIL import Image

    return (OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error, Image.DecompressionBombError)


def _check_pixels(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise ValueError(f"{width} x {height} pixels are more than the limit of {MAX_PIXELS}.")


def _to_mode(image: PILImage, channels: int, grey_max: int) -> PILImage:
    """Converts a decoded image of any mode to "L" or "RGB"."""
    from PIL import Image

    mode = "L" if channels == 1 else "RGB"
    if image.mode == mode and "transparency" not in image.info:
        return image
    if image.mode in GREY_MODES[2:]:
        image = Image.fromarray(_grey_levels(np.asarray(image), grey_max))
    elif image.has_transparency_data:
        page = Image.new("RGBA", image.size, "white")
        page.alpha_composite(image.convert("RGBA"))
        image = page
    elif image.mode not in ("1", "L", "RGB"):
        image = image.convert("RGB")
    return image if image.mode == mode else image.convert(mode)


def _grey_levels(values: np.ndarray, grey_max: int) -> np.ndarray:
    """16-bit, 32-bit or float grey values as uint8 levels of the same shape."""
    if not np.isfinite(values).all():
        raise ValueError("the float image has NaN or infinite values.")
    low, high = values.min(), values.max()
    is_float = values.dtype.kind == "f"
    limit = 255 if is_float else GREY_MAX
    if low < 0 or high > limit:
        raise ValueError(f"grey values from {low} to {high} are outside 0..{limit}.")
    if not is_float:
        return np.rint(np.minimum(values, grey_max) * (255 / grey_max)).astype(np.uint8)
    return np.rint(values * (255.0 if high <= 1 else 1.0)).astype(np.uint8)
