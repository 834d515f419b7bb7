"""Features of the examined images by a given model, and the labels that a classifier fitted to them contradicts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from pipeline.common.console import progress_bar
from pipeline.common.system import decoding_threads, usable_cores
from pipeline.data.splits import Split
from pipeline.inference.prediction import choose_device, read_image, to_input
from pipeline.inference.saved_model import SavedModel, load_saved_model
from pipeline.inspect.examine import ImageFacts
from pipeline.models.linear_probe import leave_one_out

BATCH = 64


@dataclass(frozen=True)
class Contradiction:
    """An image whose label the classifier contradicts. place: among the examined images; predicted: the class that it predicts;
    confidence, own: its probabilities of that class and of the label."""

    place: int
    predicted: int
    confidence: float
    own: float


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


def contradictions(images: Sequence[ImageFacts], features: np.ndarray, num_classes: int) -> tuple[list[Contradiction], float]:
    """The labels that contradict the leave-one-out prediction, most confident first, and the leave-one-out accuracy.

    A classifier is fitted to the features of all examined images, float32 [N, D]; the prediction of an image is that of the
    classifier fitted without it. Raises Unfittable.
    """
    labels = torch.tensor([image.label for image in images])
    probabilities, accuracy = leave_one_out(torch.from_numpy(features), labels, num_classes)
    confidences, predicted = probabilities.max(dim=1)
    own = probabilities.gather(1, labels[:, None])[:, 0]
    wrong = (predicted != labels).nonzero().flatten()
    order = wrong[confidences[wrong].argsort(descending=True, stable=True)]
    rows = zip(*(part[order].tolist() for part in (torch.arange(len(images)), predicted, confidences, own)))
    return [Contradiction(*row) for row in rows], accuracy
