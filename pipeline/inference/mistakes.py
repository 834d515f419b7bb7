"""A run's most confident mistakes on its test split: the saved model predicts it again, and the pictures are kept."""

import dataclasses
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline.data.from_settings import load_data
from pipeline.data.splits import Split
from pipeline.distributed.accelerator import make_accelerator
from pipeline.images.decode import decode_image
from pipeline.loaders.build import make_loader
from pipeline.loaders.stream_loader import AnyLoader
from pipeline.models.timm_folder import CONFIG_FILE, load_model, read_config
from pipeline.settings.parser import from_yaml
from pipeline.training.build import choose_image_size, make_preprocessing

SMALLEST_SIDE, LARGEST_SIDE = 96, 192  # of a picture in the report, in pixels


@dataclass(frozen=True)
class Mistake:
    """A test image that was classified wrong; confidence: the probability that the model gave to the predicted class."""

    where: str
    true: str
    predicted: str
    confidence: float
    true_probability: float
    png: bytes


def most_confident_mistakes(run_dir: Path, how_many: int) -> tuple[list[Mistake], int]:
    """The mistakes with the highest confidence, the highest first, and how many mistakes there are.

    The model of model/ is evaluated in fp32 on the dataset that config.yaml names. Raises ValueError where one of them is
    missing or they do not belong together.
    """
    # neither the run's precision nor its compiler: the machine of the report may have neither
    config = dataclasses.replace(from_yaml(run_dir / "config.yaml"), mixed_precision="no", compile=False)
    accelerator = make_accelerator(config)
    dataset = load_data(config, accelerator)
    model = load_model(run_dir / "model").to(accelerator.device).eval()
    if read_config(run_dir / "model" / CONFIG_FILE).get("label_names") != dataset.class_names:
        raise ValueError(f"{run_dir / 'model'} has other classes than dataset {config.dataset} has now.")
    preprocessing = make_preprocessing(config, dataset, choose_image_size(config, dataset), model)
    loader = make_loader(config, dataset.test, dataset, preprocessing, accelerator, training=False)
    probabilities = predict(model, loader)
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
            png=picture(dataset.test, row, dataset.channels),
        )
        for row in wrong[order][:how_many].tolist()
    ]
    return mistakes, len(wrong)


@torch.inference_mode()
def predict(model: Any, loader: AnyLoader) -> torch.Tensor:
    """The probabilities of all images in order; float [N, num_classes] on the CPU."""
    return torch.cat([model(images).float().softmax(dim=1).cpu() for images, _ in loader.eval_epoch()])


def picture(split: Split, row: int, channels: int) -> bytes:
    """The image as it is in the set, as a PNG: small ones enlarged by whole factors, large ones reduced."""
    from PIL import Image

    image = decode_image(split.encoded(row), channels)
    factor = -(-SMALLEST_SIDE // max(image.size))
    if factor > 1:
        image = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    image.thumbnail((LARGEST_SIDE, LARGEST_SIDE))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()
