"""Features of the examined images by a given model."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from pipeline.common.console import progress_bar
from pipeline.common.system import decoding_threads, usable_cores
from pipeline.data.splits import Split
from pipeline.inference.prediction import choose_device, read_image, to_input
from pipeline.inference.saved_model import SavedModel, load_saved_model
from pipeline.inspect.examine import ImageFacts

BATCH = 64


def load_features(source: str) -> SavedModel:
    """The model of a run, a folder, the Hub or timm, without its classifier. Raises ValueError if there is none."""
    saved = load_saved_model(source)
    reset = getattr(saved.model, "reset_classifier", None)
    if reset is None:
        raise ValueError(f"--features {source}: {type(saved.model).__name__} has no classifier that can be removed.")
    reset(0)
    return saved


@torch.inference_mode()
def features_of(saved: SavedModel, splits: Mapping[str, Split], images: Sequence[ImageFacts]) -> np.ndarray:
    """The features of the images, preprocessed as in evaluation; float32 [N, D]. Threads decode the next batch meanwhile."""
    device = choose_device("auto")
    model = saved.model.to(device)
    batches = [images[start : start + BATCH] for start in range(0, len(images), BATCH)]
    found = []
    with decoding_threads(usable_cores()) as pool, progress_bar(len(images), 0, "features", True, unit="image") as bar:

        def read(image: ImageFacts) -> torch.Tensor:
            return read_image(splits[image.split].encoded(image.row), saved.preprocessing)

        reading = pool.map(read, batches[0])
        for number, batch in enumerate(batches, 1):
            pixels = list(reading)
            if number < len(batches):
                reading = pool.map(read, batches[number])
            found.append(model(to_input(pixels, saved.preprocessing, device)).flatten(1).float().cpu())
            bar.update(len(batch))
    return torch.cat(found).numpy()
