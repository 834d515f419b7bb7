"""The model card of a saved model: its data, settings and figures, and how to load it."""

import os
from typing import Any

from pipeline.common import console
from pipeline.settings.config import DEFAULTS, FIELDS, Config
from pipeline.training.build import Parts

# settings of the run's folder and logs, which say nothing about the model
OMITTED = {"dry_run", "init_from", "log_every", "log_model", "log_with", "output_dir", "project", "resume", "run_name"}
# settings that a run fills in where they are null: whether a user has set them is not recorded
FILLED_IN = {"batch_size", "channels_last", "epochs", "freeze_batchnorm", "micro_batch_size", "mixed_precision"}

USAGE = """## Usage

With the project that trained it, for images, folders or a list of files, with the preprocessing above:

```sh
python -m pipeline.predict local-dir:PATH_OF_THIS_FOLDER IMAGE...
```

With timm alone:

```python
import timm
import pipeline  # of the project that trained it; required for simple_mlp, small_convnet* and *_small_stem only

model = timm.create_model("local-dir:PATH_OF_THIS_FOLDER", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
```

config.json contains the label names (`label_names`) and the preprocessing (`pretrained_cfg`).
"""


def model_card(config: Config, parts: Parts, summary: dict[str, Any]) -> str:
    """The README.md of a model folder, with the front matter that the Hub reads."""
    data, shape, test = parts.dataset, parts.preprocessing, summary["test"]
    # a card may be published: it does not show where folders are on this machine
    dataset = os.path.basename(config.dataset) if os.path.isabs(config.dataset) else config.dataset
    source = data.source.replace(config.dataset, dataset)
    values = {**vars(config), "dataset": dataset}
    changed = [name for name in FIELDS if name not in OMITTED and values[name] != getattr(DEFAULTS, name)]
    settings = listed({name: values[name] for name in changed if name not in FILLED_IN}) or "- none"
    filled_in = listed({name: values[name] for name in changed if name in FILLED_IN})
    versions = ", ".join(f"{name} {version}" for name, version in summary["versions"].items())
    classes = ", ".join(map(str, data.class_names[:100])) + (", ..." if len(data.class_names) > 100 else "")
    return f"""---
library_name: timm
pipeline_tag: image-classification
tags: [image-classification, timm]
---
# {config.model_name} trained on {dataset}

An image classifier with {len(data.class_names)} classes and {summary["num_parameters"]:,} parameters. Its input is
{shape.channels} x {shape.image_size} x {shape.image_size} with mean {shape.mean} and std {shape.std}, resized by
{shape.interpolation} interpolation.

## Figures

| split | images | accuracy | balanced accuracy | macro F1 | top-5 accuracy | loss |
| --- | ---: | ---: | ---: | ---: | ---: | ---: |
{figures_row("validation", summary["best"])}
{figures_row("test", test)}

The weights are those of epoch {summary["best"]["epoch"]} of {summary["epochs"]}, the best by validation {config.monitor}. \
The test split was evaluated once, with these weights.

## Data

{source}: {len(data.train):,} training, {len(data.val):,} validation and {len(data.test):,} test images.
{" ".join(data.notes)}
Classes: {classes}.

## Settings that differ from the defaults

{settings}

## Settings that a run chooses unless they are set

{filled_in}

Trained in {console.duration(summary["seconds"])} on {summary["device"]}, {summary["num_processes"]} process(es), with {versions}.

{USAGE}"""


def listed(settings: dict[str, Any]) -> str:
    return "\n".join(f"- {name}: {value}" for name, value in settings.items())


def figures_row(name: str, values: dict[str, Any]) -> str:
    cells = (
        f"{values['num_samples']:,}",
        # an epoch before a resume by this version may lack the balanced figures
        *(console.percent(values.get(key)) for key in ("accuracy", "balanced_accuracy", "macro_f1", "top5_accuracy")),
    )
    return f"| {name} | {' | '.join(cells)} | {values['loss']:.4f} |"
