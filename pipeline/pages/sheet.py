"""Contact sheets: pictures with captions in one image, drawn by Pillow alone, because matplotlib takes a second to import."""

from __future__ import annotations

import functools
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image as PILImage
    from PIL.ImageFont import FreeTypeFont

SMALLEST_TILE, LARGEST_TILE = 96, 112  # bounds of a picture's longer side in pixels
GAP, CAPTION_SIZE, LINE_HEIGHT = 8, 11, 14  # pixels
PAPER, INK = "#fffffe", "#1b1b1a"
MISSING = "\U0010ffff"  # no font has this character


@functools.cache
def caption_font() -> FreeTypeFont:
    from PIL import ImageFont

    font = ImageFont.load_default(CAPTION_SIZE)
    assert isinstance(font, ImageFont.FreeTypeFont)
    return font


@functools.cache
def has_glyph(character: str) -> bool:
    """Whether the font of the captions has the character; it is Pillow's own and has Latin letters only."""
    font = caption_font()
    return bytes(font.getmask(character)) != bytes(font.getmask(MISSING))


def caption_name(name: str, number: int) -> str:
    """The class name as a caption shows it: `class 3` if the font lacks one of its characters."""
    shown = " ".join(name.split())
    return shown if shown and all(letter == " " or has_glyph(letter) for letter in shown) else f"class {number}"


def shortened(text: str, width: int) -> str:
    """The text, cut off with an ellipsis if it is wider than `width` pixels."""
    font = caption_font()
    if font.getlength(text) <= width:
        return text
    kept = next((length for length in range(len(text), 0, -1) if font.getlength(f"{text[:length]}…") <= width), 0)
    return f"{text[:kept]}…"


def as_tile(image: PILImage, smallest: int = SMALLEST_TILE, largest: int = LARGEST_TILE) -> PILImage:
    """The image, a small one enlarged by an integer factor, a large one reduced."""
    from PIL import Image

    factor = -(-smallest // max(image.size))
    if factor > 1:
        return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    tile = image.copy()
    tile.thumbnail((largest, largest), Image.Resampling.BILINEAR)
    return tile


def contact_sheet(images: Sequence[np.ndarray], captions: Sequence[Sequence[str]], columns: int) -> PILImage:
    """One picture of all images, each above its caption. images: uint8 [H, W, 1 or 3]; captions: lines of text per image."""
    from PIL import Image, ImageDraw

    tiles = [as_tile(Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image)) for image in images]
    width, height = (max(sides) for sides in zip(*(tile.size for tile in tiles)))
    cell = (width + GAP, height + GAP + LINE_HEIGHT * max(map(len, captions)))
    columns = min(columns, len(tiles))
    rows = -(-len(tiles) // columns)
    sheet = Image.new("RGB", (columns * cell[0] + GAP, rows * cell[1] + GAP), PAPER)
    draw = ImageDraw.Draw(sheet)
    for place, (tile, lines) in enumerate(zip(tiles, captions)):
        left, top = GAP + place % columns * cell[0], GAP + place // columns * cell[1]
        sheet.paste(tile, (left, top))
        for number, line in enumerate(lines):
            text = shortened(line, width)
            draw.text((left, top + tile.height + number * LINE_HEIGHT), text, fill=INK, font=caption_font())
    return sheet


def jpeg_bytes(image: PILImage) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=85)
    return buffer.getvalue()


def png_bytes(image: PILImage) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()
