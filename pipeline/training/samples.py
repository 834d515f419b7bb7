"""samples.png: the first training batch of a run as the model receives it, with its labels."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
from torch import Tensor

from pipeline.common import console
from pipeline.common.files import write_atomically
from pipeline.images.preprocessing import Preprocessing
from pipeline.loaders.loader import Batch
from pipeline.pages.sheet import caption_name, contact_sheet, png_bytes
from pipeline.settings.batch_size import IGNORED
from pipeline.training.build import Parts
from pipeline.training.run import Run
from pipeline.training.state import TrainState

NUM_SAMPLES, COLUMNS = 24, 8
MOST_LABELS = 2  # shown of a mixed label, the largest shares first
SMALLEST_SHARE = 0.005  # of a mixed label that is shown; a smaller one would be 0.00


def samples_path(run_dir: Path) -> Path:
    return run_dir / "samples.png"


def sample_writer(state: TrainState, parts: Parts, run: Run) -> Callable[[Batch], None] | None:
    """Writes samples.png from a batch, if this is rank 0 at the first step of a run; None on other ranks and later.

    With several processes the batch is rank 0's share. The time is not counted as training. Warns if the file cannot be written.
    """
    if state.step or not run.accelerator.is_main_process:
        return None

    def write(batch: Batch) -> None:
        start = perf_counter()
        content = batch_png(batch, parts.preprocessing, parts.dataset.class_names)
        try:
            write_atomically(samples_path(run.config.run_dir), content)
        except OSError as error:
            console.warn(f"samples.png could not be written: {error}. Training continues.")
        seconds = perf_counter() - start
        state.seconds += seconds
        run.last_read += seconds

    return write


def shown_first(batches: Iterator[Batch], show: Callable[[Batch], None] | None) -> Iterator[Batch]:
    """The batches; `show` is called with the first one before it is used."""
    if show is None:
        return batches

    def with_show() -> Iterator[Batch]:
        for batch in batches:
            show(batch)
            yield batch
            break
        yield from batches

    return with_show()


def batch_png(batch: Batch, preprocessing: Preprocessing, class_names: Sequence[str]) -> bytes:
    """The first NUM_SAMPLES images of a training batch as PNG, each with its label or the shares of its mixed label."""
    images, labels = (part[:NUM_SAMPLES].cpu() for part in batch)
    captions = [label_lines(label, class_names) for label in labels]
    return png_bytes(contact_sheet(as_pictures(images, preprocessing), captions, COLUMNS))


def as_pictures(images: Tensor, preprocessing: Preprocessing) -> list[np.ndarray]:
    """Model input as uint8 arrays [S, S, C]. images: float [B, C, S, S]; the normalisation is undone."""
    mean, std = (torch.tensor(values)[:, None, None] * 255 for values in (preprocessing.mean, preprocessing.std))
    pixels = (images.float().cpu() * std).add_(mean).round_().clamp_(0, 255).to(torch.uint8)
    return list(pixels.permute(0, 2, 3, 1).contiguous().numpy())


def label_lines(label: Tensor, class_names: Sequence[str]) -> list[str]:
    """A label in words, a line for each class. label: int64 [] or, if it is mixed, float [num_classes]."""
    if not label.is_floating_point():
        number = int(label)
        return ["(no image)" if number == IGNORED else caption_name(class_names[number], number)]
    shares, numbers = label.sort(descending=True, stable=True)
    shown = [(share, number) for share, number in zip(shares.tolist(), numbers.tolist()) if share >= SMALLEST_SHARE][:MOST_LABELS]
    if len(shown) == 1:
        return [caption_name(class_names[shown[0][1]], shown[0][1])]
    return [f"{share:.2f} {caption_name(class_names[number], number)}" for share, number in shown]
