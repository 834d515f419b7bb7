"""Datasets for the measurements: synthetic ones, which need no network, and any training split as peers read it."""

import dataclasses
import io
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from pipeline.common.system import usable_cores

NUM_CLASSES = 10
PHOTO_SIZE = (500, 375)  # width and height in pixels, the most frequent of ImageNet
NUM_TEST = 10
OCTAVES = (4, 8, 16, 32, 64, 128)  # numbers of cells across the fields that add up to an image; larger than the image are skipped
FADING = 0.6  # ratio of a field's strength to that of the octave before
NOISE = 7.0  # standard deviation of the noise, in levels of 255
JPEG_QUALITY = 96


def made_image(width: int, height: int, seed: int) -> Image.Image:
    """An image of smooth random fields of several scales plus noise, which compresses about as well as a photo.

    A PNG of 32x32 takes 2.5 kB (CIFAR-10: 2.3), a JPEG of 500x375 about 100 kB (ImageNet: 110).
    """
    rng = np.random.default_rng(seed)
    total = np.zeros((height, width, 3), np.float32)
    octaves = [cells for cells in OCTAVES if cells <= max(width, height)]
    strengths = FADING ** np.arange(len(octaves))
    for cells, strength in zip(octaves, strengths / strengths.sum()):
        field = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), np.uint8))
        total += np.asarray(field.resize((width, height), Image.Resampling.BICUBIC), np.float32) * strength
    total += rng.normal(0, NOISE, total.shape)
    return Image.fromarray(total.clip(0, 255).astype(np.uint8))


def encoded(image: Image.Image, kind: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **({"quality": JPEG_QUALITY} if kind == "JPEG" else {}))
    return buffer.getvalue()


def write_parquet(path: Path, images: list[bytes], labels: list[int]) -> None:
    """Writes a Parquet file with the columns image (`datasets.Image`) and label, which `datasets` reads."""
    import datasets

    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    columns = {"image": [{"bytes": image, "path": None} for image in images], "label": labels}
    pq.write_table(pa.table(columns, schema=features.arrow_schema), path, row_group_size=1000)


def make_set(set_folder: str, num_images: int, side: int | None, folder: str) -> dict[str, Any]:
    """Writes train.parquet with `num_images` images and a small test.parquet; returns the mean bytes_per_image.

    side: of square PNG images in pixels; None writes JPEG photos of PHOTO_SIZE.
    """
    (width, height), kind = ((side, side), "PNG") if side else (PHOTO_SIZE, "JPEG")
    num_bytes = 0
    with ThreadPoolExecutor(usable_cores()) as pool:
        for split, count, first in (("train", num_images, 0), ("test", NUM_TEST, num_images)):
            images = list(pool.map(lambda seed: encoded(made_image(width, height, seed), kind), range(first, first + count)))
            write_parquet(Path(set_folder) / f"{split}.parquet", images, [number % NUM_CLASSES for number in range(count)])
            num_bytes = num_bytes or sum(map(len, images))
    return {"bytes_per_image": num_bytes / num_images}


def peer_set(settings: list[str], parquet: str, folder: str) -> dict[str, Any]:
    """Writes the encoded training split of the settings to a Parquet file for `datasets`.

    Returns its description for the peers: parquet, num_images, num_classes, flip, and Preprocessing's fields.
    """
    from pipeline.data.from_settings import load_data
    from pipeline.distributed.accelerator import make_accelerator
    from pipeline.settings.parser import read_config
    from pipeline.training.build import check_settings, choose_image_size, make_model, make_preprocessing

    config = read_config([*settings, "--loader=auto"])  # a stream has no rows to copy
    check_settings(config)
    dataset = load_data(config, make_accelerator(config))
    image_size = choose_image_size(config, dataset)
    model, _ = make_model(config, dataset, image_size)
    shape = make_preprocessing(config, dataset, image_size, model)
    split = dataset.train
    images = [split.encoded(row) for row in range(len(split))]
    write_parquet(Path(parquet), images, [int(label) for label in split.labels])
    return {
        **dataclasses.asdict(shape),
        "parquet": parquet,
        "num_images": len(split),
        "num_classes": len(dataset.class_names),
        "flip": dataset.flip if config.flip is None else config.flip,
    }


def class_folders(settings: list[str], photos: str, folder: str) -> dict[str, Any]:
    """Writes the splits of the settings as photos/train, photos/val and photos/test with a folder for each class.

    The folders are named by class number. JPEG and PNG files are copied, all others become PNG, which every peer reads. Builds
    the model once, so that published weights are downloaded before anything is timed. Returns num_classes, image_size, and the
    number of images by split. Raises ValueError for images that are not RGB and for settings that a run would refuse.
    """
    from pipeline.data.from_settings import input_channels, load_data
    from pipeline.distributed.accelerator import make_accelerator
    from pipeline.settings.parser import read_config
    from pipeline.training.build import check_settings, choose_image_size, make_model

    config = read_config([*settings, "--loader=auto"])
    check_settings(config)
    dataset = load_data(config, make_accelerator(config))
    if input_channels(config, dataset) != 3:
        raise ValueError(f"finetune compares models of RGB images, and those of {config.dataset} are grey.")
    image_size = choose_image_size(config, dataset)
    make_model(config, dataset, image_size)
    splits = {"train": dataset.train, "val": dataset.val, "test": dataset.test}
    for name, split in splits.items():
        for number in range(len(dataset.class_names)):
            (Path(photos) / name / f"{number:04d}").mkdir(parents=True)
        for row, label in enumerate(split.labels):
            content, ending = readable(split.encoded(row))
            (Path(photos) / name / f"{label:04d}" / f"{row:06d}.{ending}").write_bytes(content)
    counts = {f"num_{name}": len(split) for name, split in splits.items()}
    return {"num_classes": len(dataset.class_names), "image_size": image_size, **counts}


def readable(content: bytes) -> tuple[bytes, str]:
    """The file of an image as it is if it is a JPEG or PNG file, else as a PNG file; and the ending of its name."""
    image = Image.open(io.BytesIO(content))
    if image.format in ("JPEG", "PNG"):
        return content, image.format.lower()
    return encoded(image, "PNG"), "png"
