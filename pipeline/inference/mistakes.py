"""A run's most confident mistakes on its test split, with their pictures, from a new prediction by the saved model."""

import dataclasses
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline.data.splits import Split
from pipeline.images.decode import decode_image
from pipeline.inference.saved_evaluation import put_on_split
from pipeline.inference.saved_model import load_saved_model
from pipeline.loaders.stream_loader import AnyLoader
from pipeline.training.losses import probabilities as class_probabilities

SMALLEST_SIDE, LARGEST_SIDE = 96, 192  # of a picture in the report: bounds of its longer side in pixels


@dataclass(frozen=True)
class Mistake:
    """A misclassified test image. confidence: probability of the predicted class; true_probability: of the true class."""

    where: str
    true: str
    predicted: str
    confidence: float
    true_probability: float
    png: bytes


def most_confident_mistakes(
    run_dir: Path, how_many: int, moved_to: str | None = None
) -> tuple[list[Mistake], int]:
    """The `how_many` mistakes of the highest confidence, in decreasing order, and the number of all mistakes.

    Evaluates the model of model/ in fp32 on the dataset of config.yaml; moved_to: its folder, if it has moved. Raises
    ValueError if the model or the dataset is missing or the dataset has changed, CommandFailed for an image that cannot be read.
    """
    saved = load_saved_model(str(run_dir))
    if saved.config is None:
        raise ValueError(f"{run_dir} has no config.yaml, which names its dataset. Pass the folder of a run.")
    # the machine of the report may not support the run's precision or compilation
    config = dataclasses.replace(saved.config, mixed_precision="no", compile=False, gradient_checkpointing=False)
    if moved_to is not None:
        config = dataclasses.replace(config, dataset=moved_to)
    on_split = put_on_split(saved, config, "test")
    dataset = on_split.dataset
    if saved.label_names != dataset.class_names:
        raise ValueError(
            f"The classes of {run_dir / 'model'} differ from those of dataset {config.dataset}. Pass the dataset of the run with "
            "--dataset."
        )
    probabilities = predict(on_split.model, on_split.loader, saved.loss)
    labels = torch.from_numpy(dataset.test.labels)
    confidences, predicted = probabilities.max(dim=1)
    wrong = (predicted != labels).nonzero().flatten()
    order = confidences[wrong].argsort(descending=True, stable=True)
    mistakes = [
        Mistake(
            where=dataset.test.where(row),
            true=dataset.class_names[int(labels[row])],
            predicted=dataset.class_names[int(predicted[row])],
            confidence=float(confidences[row]),
            true_probability=float(probabilities[row, labels[row]]),
            png=picture(dataset.test, row, dataset.channels, saved.preprocessing.grey_max),
        )
        for row in wrong[order][:how_many].tolist()
    ]
    return mistakes, len(wrong)


@torch.inference_mode()
def predict(model: Any, loader: AnyLoader, loss: str) -> torch.Tensor:
    """The class probabilities of all images in order; float [N, num_classes] on the CPU."""
    return torch.cat([class_probabilities(model(images).float(), loss).cpu() for images, _ in loader.eval_epoch()])


def picture(split: Split, row: int, channels: int, grey_max: int) -> bytes:
    """The image of the dataset as PNG bytes; small ones are enlarged by an integer factor, large ones reduced."""
    from PIL import Image

    image = decode_image(split.encoded(row), channels, grey_max=grey_max)
    factor = -(-SMALLEST_SIDE // max(image.size))
    if factor > 1:
        image = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    image.thumbnail((LARGEST_SIDE, LARGEST_SIDE))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()
