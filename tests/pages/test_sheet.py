"""Contact sheets: sizes of the pictures, captions that fit."""

import io

import numpy as np
import pytest
from PIL import Image

from pipeline.pages import sheet


@pytest.mark.parametrize("size, expected", [((8, 8), (96, 96)), ((100, 40), (100, 40)), ((300, 150), (112, 56))])
def test_a_sheet_enlarges_small_pictures_and_reduces_large_ones(size, expected):
    tile = sheet.as_tile(Image.new("RGB", size))
    assert tile.size == expected
    drawn = sheet.contact_sheet([np.zeros((*size[::-1], 3), np.uint8)] * 3, [["a"], ["b", "c" * 400], []], columns=2)
    assert drawn.size == (2 * (expected[0] + 8) + 8, 2 * (expected[1] + 8 + 2 * 14) + 8)
    assert Image.open(io.BytesIO(sheet.png_bytes(drawn))).size == drawn.size
    short = sheet.shortened("c" * 400, 96)
    assert short.endswith("…") and 80 < sheet.caption_font().getlength(short) <= 96
    assert sheet.shortened("cat", 96) == "cat"
