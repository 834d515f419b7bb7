"""Decoding: images whose pixels are whole are used, whatever their metadata."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from pipeline.images.decode import ORIENTATION, BadImage, decode_image, image_header

PIXELS = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3) * 3


def encoded(image: Image.Image, kind: str = "png", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def with_chunk(png: bytes, kind: bytes, content: bytes, crc: int | None = None) -> bytes:
    """The PNG with a chunk after its header."""
    crc = zlib.crc32(kind + content) if crc is None else crc
    return png[:33] + struct.pack(">I", len(content)) + kind + content + struct.pack(">I", crc) + png[33:]


def turned(orientation: int) -> np.ndarray:
    """The pixels as the Exif standard shows them, from the definition of each orientation."""
    upright = PIXELS if orientation < 5 else PIXELS.transpose(1, 0, 2)
    return {1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1], 5: upright,
            6: upright[:, ::-1], 7: upright[::-1, ::-1], 8: upright[::-1]}[orientation]  # fmt: skip


@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_is_turned_by_its_orientation(orientation):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    image = decode_image(encoded(Image.fromarray(PIXELS), exif=exif), 3)
    assert np.array_equal(np.asarray(image), turned(orientation))


@pytest.mark.parametrize(
    "exif",
    [
        b"Exif\0\0II*\0",
        b"Exif\0\0not a TIFF header",
        b"Exif\0\0MM\0*\0\0\0\x08\xff\xff",
        b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x05\0\x01\0\0\0\xff\xff\xff\xff",
    ],
)
@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
@pytest.mark.filterwarnings("ignore:Corrupt EXIF data|Truncated File Read:UserWarning")  # pytest drops the module's own filter
def test_a_damaged_exif_block_leaves_the_image_upright(exif, kind):
    image = Image.fromarray(np.full((4, 6, 3), 90, np.uint8))
    decoded = decode_image(encoded(image, kind, exif=exif), 3)
    assert decoded.size == (6, 4) and abs(int(np.asarray(decoded).mean()) - 90) < 3


def test_an_orientation_beside_damaged_entries_still_counts():
    entries = struct.pack("<HHHIHHHHII", 2, ORIENTATION, 3, 1, 6, 0, 0x8769, 4, 1, 0xFFFFFFF0)
    exif = b"Exif\0\0II*\0\x08\0\0\0" + entries + b"\0\0\0\0"
    assert decode_image(encoded(Image.fromarray(PIXELS), exif=exif), 3).size == (4, 6)


def test_a_png_is_read_whatever_its_text_and_colour_profile():
    plain = encoded(Image.fromarray(PIXELS))
    large = zlib.compress(b"x" * (PngImagePlugin.MAX_TEXT_CHUNK + 1))
    damaged = {
        "a large text": with_chunk(plain, b"zTXt", b"comment\0\0" + large),
        "a large profile": with_chunk(plain, b"iCCP", b"profile\0\0" + large),
        "a wrong checksum": with_chunk(plain, b"tEXt", b"comment\0hello", crc=1),
    }
    for what, png in damaged.items():
        assert np.array_equal(np.asarray(decode_image(png, 3)), PIXELS), what
        assert image_header(png)[:3] == (6, 4, "RGB"), what


def test_a_png_without_its_pixels_is_still_bad():
    plain = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)))
    for cut in (plain[: len(plain) // 2], plain[:40], plain.replace(b"IDAT", b"JDAT")):
        with pytest.raises(BadImage):
            decode_image(cut, 3)
