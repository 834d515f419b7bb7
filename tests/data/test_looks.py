"""What a sample of a dataset decides: size, channels, the range of 16-bit values; and classes with few images."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from pipeline.data.image_dataset import load_image_dataset
from pipeline.data.splits import stratified_rows
from pipeline.images.decode import decode_image


def write_deep(root, largest: int, file_format: str = "PNG") -> None:
    """Two classes of 16-bit grey images with values up to the largest."""
    draw = np.random.default_rng(0)
    for number, name in enumerate(("a", "b")):
        (root / name).mkdir(parents=True)
        for index in range(10):
            values = draw.integers(0, largest + 1, (8, 8)).astype(np.uint16)
            values[0, 0] = largest
            Image.fromarray(values).save(root / name / f"{index}.{file_format.lower()}")


@pytest.mark.parametrize("file_format", ["PNG", "TIFF"])
@pytest.mark.parametrize(
    "largest, grey_max", [(200, 255), (1000, 1023), (2040, 4095), (4095, 4095), (16000, 16383), (16384, 65535)]
)
def test_the_range_of_sixteen_bit_images_is_that_of_the_set(tmp_path, largest, grey_max, file_format):
    write_deep(tmp_path, largest, file_format)
    loaded = load_image_dataset(str(tmp_path))
    assert (loaded.grey_max, loaded.channels) == (grey_max, 1)
    assert any(f"{grey_max} and above become white" in note for note in loaded.notes) == (grey_max < 65535)
    values = np.asarray(Image.open(io.BytesIO(loaded.train.encoded(0)))).astype(float)
    decoded = np.asarray(decode_image(loaded.train.encoded(0), 1, grey_max=grey_max))
    assert np.array_equal(decoded, np.rint(values * 255 / grey_max)) and decoded.max() == round(255 * largest / grey_max)


def test_values_above_the_range_are_white():
    stream = io.BytesIO()
    Image.fromarray(np.array([[0, 2048, 4095, 5000, 65535]], np.uint16)).save(stream, "PNG")
    assert np.asarray(decode_image(stream.getvalue(), 1, grey_max=4095)).tolist() == [[0, 128, 255, 255, 255]]


def test_eight_bit_images_have_the_full_range(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for index in range(10):
            Image.fromarray(np.full((8, 8), index, np.uint8)).save(tmp_path / name / f"{index}.png")
    assert load_image_dataset(str(tmp_path)).grey_max == 65535


def deep_color_png(value: int) -> bytes:
    """A 16-bit RGB PNG of 8x8 pixels, which Pillow cannot write."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    rows = b"".join(b"\0" + struct.pack(">24H", *[value] * 24) for _ in range(8))
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 16, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("value, is_dark", [(4095, True), (65535, False)])
def test_sixteen_bit_color_is_reported(tmp_path, value, is_dark):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for index in range(10):
            (tmp_path / name / f"{index}.png").write_bytes(deep_color_png(value))
    (note,) = [note for note in load_image_dataset(str(tmp_path)).notes if "16-bit color" in note]
    assert ("convert these images to 8 bits first" in note) == is_dark


# Classes with few images


def test_a_row_of_each_class_is_kept():
    labels = np.array([0] * 20 + [1] * 3 + [2, 3, 4])
    for size in range(1, 30):
        rows = stratified_rows(labels, size, 0, keep=1)
        assert len(rows) == min(size, 21) and np.bincount(labels[rows], minlength=5).tolist()[2:] == [0, 0, 0]
        assert np.bincount(labels[rows], minlength=5)[1] <= 2
    many = np.random.default_rng(0).integers(0, 7, 200)
    assert stratified_rows(many, 17, 3, keep=1).tolist() == stratified_rows(many, 17, 3).tolist()


def test_single_images_stay_in_training(tmp_path):
    for name, count in (("a", 10), ("b", 12), *((f"single{number}", 1) for number in range(8))):
        (tmp_path / name).mkdir()
        for index in range(count):
            Image.fromarray(np.full((8, 8), index, np.uint8)).save(tmp_path / name / f"{index}.png")
    for seed in range(5):
        loaded = load_image_dataset(str(tmp_path), seed=seed, val_fraction=0.3)
        assert np.bincount(loaded.train.labels, minlength=10)[2:].tolist() == [1] * 8
        assert len(loaded.val) + len(loaded.test) == 13 and not any("no training image" in note for note in loaded.notes)


def test_classes_without_a_training_image_are_named():
    loaded = load_image_dataset("digits", max_train_samples=4, val_fraction=0.25)
    missing = [str(number) for number in range(10) if number not in loaded.train.labels]
    (note,) = [note for note in loaded.notes if "no training image" in note]
    assert note.startswith(f"{len(missing)} of 10 classes have no training image: {', '.join(missing[:6])}")


def test_validation_takes_single_images_only_where_there_are_no_others(tmp_path):
    loaded = load_image_dataset("digits", max_train_samples=10, val_fraction=0.2)
    assert (len(loaded.train), len(loaded.val)) == (8, 2)
    loaded = load_image_dataset("digits", max_train_samples=12, val_fraction=0.5)
    assert len(loaded.val) == 2 and len(set(loaded.train.labels.tolist())) == 10


def test_a_stream_looks_at_rows_of_several_chunks(tmp_path):
    """The set is sorted: the first class is grey and of 8x8 pixels, the last one in color and larger."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    def png(number: int) -> bytes:
        stream = io.BytesIO()
        shape = (8, 8) if number < 60 else (16, 16, 3)
        Image.fromarray(np.full(shape, number, np.uint8)).save(stream, "PNG")
        return stream.getvalue()

    table = pa.table({"image": [png(number) for number in range(100)], "label": [number // 50 for number in range(100)]})
    pq.write_table(table, tmp_path / "train.parquet", row_group_size=10)
    loaded = load_image_dataset(str(tmp_path), streamed=True)
    assert (loaded.image_size, loaded.channels) == (None, 3)
