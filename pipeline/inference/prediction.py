"""Predicts image files with a saved model, preprocessed exactly as in evaluation."""

import codecs
import glob
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor, nn

from pipeline.common.system import decoding_threads, usable_cores
from pipeline.images.augment import BatchTransform
from pipeline.images.crop import fit_for_eval
from pipeline.images.decode import BadImage, decode_pixels
from pipeline.images.files import FolderWalk, LeftOut, is_image
from pipeline.images.preprocessing import Preprocessing
from pipeline.inference.saved_model import SavedModel
from pipeline.training.losses import probabilities


@dataclass(frozen=True)
class Prediction:
    """The most probable classes of an image, in decreasing order. problem: why the image could not be read, or None."""

    path: str
    classes: tuple[int, ...] = ()
    probabilities: tuple[float, ...] = ()
    problem: str | None = None


def read_list(stream: BinaryIO) -> list[str]:
    """The lines of a list of paths, in UTF-8 or in the bytes of the file names. Raises ValueError for UTF-16 and NUL bytes."""
    content = stream.read()
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise ValueError("The list on standard input is UTF-16. Convert it to UTF-8, for example with iconv -f UTF-16 -t UTF-8.")
    if b"\0" in content:
        raise ValueError("The list on standard input contains NUL bytes. Write one path per line, in UTF-8.")
    lines = map(os.fsdecode, content.removeprefix(codecs.BOM_UTF8).split(b"\n"))
    return [line if os.path.lexists(line) else line.removesuffix("\r") for line in lines]


def find_images(places: Iterable[str], listed: Iterable[str] = ()) -> tuple[list[str], list[str], list[str]]:
    """The paths of images in the order of the places, a message for each place without images, and notes on other files.

    A place is a file, a folder (all images below it, sorted by name), a pattern such as photos/**/*.jpg, or `-` for the
    lines of `listed`, each of which is a file or a folder.
    """
    found: list[str] = []
    problems: list[str] = []
    left_out = LeftOut()
    for place in places:
        for line in filter(None, listed) if place == "-" else [place]:
            try:
                images = images_at(line, is_pattern=place != "-", left_out=left_out)
            except ValueError as error:
                problems.append(str(error))
                continue
            found += images
            if not images:
                problems.append(f"{line}: {why_no_images(line)}")
    return found, problems, left_out.notes()


def images_at(place: str, is_pattern: bool, left_out: LeftOut) -> list[str]:
    """Images of a file, a folder or, if it is neither, a pattern; of folders and patterns, only the files that are images.

    Raises ValueError for a folder that cannot be read.
    """
    path = Path(place).expanduser()
    if path.is_dir():
        return FolderWalk(path, left_out).images()
    if path.exists():
        return [str(path)]
    pattern = with_literal_folders(path)
    matches = sorted(glob.glob(pattern, recursive=True)) if is_pattern and glob.has_magic(pattern) else []
    return [match for match in matches if Path(match).is_file() and is_image(match, left_out)]


def with_literal_folders(path: Path) -> str:
    """The path as a pattern whose leading folders, if they exist under these names (photos[1]), match only themselves."""
    literal = Path()
    for number, part in enumerate(path.parts):
        if not (literal / part).is_dir():
            return os.path.join(glob.escape(str(literal)) if number else "", *path.parts[number:])
        literal /= part
    return glob.escape(str(literal))


def why_no_images(place: str) -> str:
    if Path(place).expanduser().is_dir():
        return "no image below this folder."
    return "no image matches this pattern." if glob.has_magic(place) else "no such file or folder."


def read_image(encoded: bytes, preprocessing: Preprocessing) -> Tensor:
    """The image as the loaders of training read it, uint8 [C, S, S]. Raises BadImage."""
    return fit_for_eval(decode_pixels(encoded, preprocessing.channels, grey_max=preprocessing.grey_max), preprocessing)


def read_file(path: str, preprocessing: Preprocessing) -> Tensor | str:
    """The result of read_image, or a message if the file cannot be read."""
    try:
        return read_image(Path(path).read_bytes(), preprocessing)
    except OSError as error:
        return f"{path}: cannot be read: {error.strerror}."
    except BadImage as error:
        return f"{path}: {error}"


def to_input(images: Sequence[Tensor], preprocessing: Preprocessing, device: torch.device) -> Tensor:
    """Model input, float32 [B, channels, image_size, image_size], as in evaluation; images: uint8 from read_image."""
    transform = BatchTransform(preprocessing, device=device, augment="none", flip=False, seed=0)
    return transform.eval(torch.stack(list(images)).to(device))


def predict(
    saved: SavedModel, paths: Sequence[str], *, top_k: int, batch_size: int, device: torch.device
) -> Iterator[Prediction]:
    """Yields a prediction for each path, in order. Threads read and decode the next batch while the model runs."""
    saved.model.to(device)
    with decoding_threads(usable_cores()) as pool:

        def start(batch: Sequence[str]) -> list[Future[Tensor | str]]:
            return [pool.submit(read_file, path, saved.preprocessing) for path in batch]

        batches = [paths[first : first + batch_size] for first in range(0, len(paths), batch_size)] + [[]]
        reading = start(batches[0])
        for batch, following in pairwise(batches):
            read = [future.result() for future in reading]
            reading = start(following)
            yield from predict_batch(saved, batch, read, top_k, device)


def predict_batch(
    saved: SavedModel,
    paths: Sequence[str],
    read: Sequence[Tensor | str],
    top_k: int,
    device: torch.device,
) -> list[Prediction]:
    """A prediction for each path. read: the results of read_file for the paths, images uint8 [C, S, S] or messages."""
    images = [image for image in read if isinstance(image, Tensor)]
    best: Iterator[tuple[tuple[int, ...], tuple[float, ...]]] = iter(())
    if images:
        found = probabilities_of(saved.model, to_input(images, saved.preprocessing, device), saved.loss)
        # stable: of equal probabilities the first class, as in evaluation
        values, classes = (part[:, :top_k] for part in found.sort(dim=1, descending=True, stable=True))
        best = zip(map(tuple, classes.tolist()), map(tuple, values.tolist()))
    return [
        Prediction(path, problem=image) if isinstance(image, str) else Prediction(path, *next(best))
        for path, image in zip(paths, read)
    ]


@torch.inference_mode()
def probabilities_of(model: nn.Module, images: Tensor, loss: str) -> Tensor:
    """The class probabilities, float32 [B, num_classes]; images: model input [B, C, S, S]; loss: as in SavedModel."""
    return probabilities(model(images).float(), loss)


def choose_device(name: str) -> torch.device:
    """The device of that name; auto is the GPU if there is one, else the CPU. Raises ValueError if it is not available."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    device = torch.device("cpu") if accelerator is None or name == "cpu" else accelerator
    if name not in ("auto", device.type):
        raise ValueError(f"No device {name} is available, only {device.type}. Use --device auto or cpu.")
    return device
