"""fastai's fine_tune on class folders; `finetune` runs it with a Python that has fastai, without the rest of this package.

The photos are resized and augmented as in https://docs.fast.ai/tutorial.vision.html, in the ratio of its sizes.
"""

import json
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch
from fastai.vision.all import (
    Callback,
    ImageDataLoaders,
    Resize,
    accuracy,
    aug_transforms,
    get_image_files,
    set_seed,
    vision_learner,
)

PRESIZE, MIN_SCALE = 460 / 224, 0.75

given = json.loads(sys.argv[1])
photos = Path(given["photos"])
set_seed(given["seed"])
loaders = ImageDataLoaders.from_folder(
    photos,
    train="train",
    valid="val",
    bs=given["batch_size"],
    num_workers=given["workers"],
    item_tfms=Resize(round(PRESIZE * given["image_size"])),
    batch_tfms=aug_transforms(size=given["image_size"], min_scale=MIN_SCALE),
)
learner = vision_learner(loaders, given["weights"], metrics=accuracy)
moments: list[tuple[float, dict[str, torch.Tensor]]] = []


def mark() -> None:
    weights = {name: tensor.clone() for name, tensor in learner.model.state_dict().items()}
    moments.append((time.time() - given["began"], weights))


class Marking(Callback):
    """Marks the end of each epoch, after its validation."""

    order = 90

    def after_epoch(self) -> None:
        mark()


mark()
with learner.no_bar(), learner.no_logging():
    learner.fine_tune(given["epochs"] - 1, cbs=Marking())
    test = loaders.test_dl(get_image_files(photos / "test"), with_labels=True)
    epochs = []
    for epoch, (seconds, weights) in enumerate(moments):
        learner.model.load_state_dict(weights)
        epochs.append({"epoch": epoch, "seconds": seconds, "test_accuracy": float(learner.validate(dl=test)[1])})
device = torch.cuda.get_device_name() if loaders.device.type == "cuda" else loaders.device.type
result = {"epochs": epochs, "test_accuracy": epochs[-1]["test_accuracy"], "device": device}
result |= {"threads": torch.get_num_threads(), "fastai": version("fastai")}
with open(sys.argv[2], "w") as file:
    json.dump(result, file)
