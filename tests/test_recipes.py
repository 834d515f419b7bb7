"""Recipes: each describes its hardware, and takes its first steps."""

import dataclasses
import re

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

from pipeline.settings.parser import read_config

RECIPES = sorted((ROOT / "pipeline" / "recipes").glob("*.yaml"))
SMALL = {"max_train_samples": None, "val_fraction": 0.5, "epochs": 1, "batch_size": 8}


def test_the_readme_lists_every_recipe_once():
    section = (ROOT / "README.md").read_text().split("\n## Recipes\n")[1].split("\n## ")[0]
    assert sorted(re.findall(r"`(\w+\.yaml)`", section)) == [path.name for path in RECIPES]
    assert len(RECIPES) >= 12


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_describes_its_hardware(path):
    assert "Hardware: " in path.read_text().splitlines()[1]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """32 grey images of 8 x 8 pixels for training and 8 for testing, in four classes."""
    folder, draw = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for split, number in (("train", 8), ("test", 2)):
        for name in ("ant", "bee", "cat", "dog"):
            (folder / split / name).mkdir(parents=True)
            for index in range(number):
                pixels = draw.integers(0, 256, (8, 8), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{index}.png")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_takes_its_first_steps(path, pictures, tmp_path):
    """On few and small images, without published weights and on the CPU's precision; all else as it stands."""
    from pipeline.training.loop import train

    config = read_config(["--config", str(path)])
    image_size = 16 if (config.image_size or 0) > 32 else None
    changes = {
        **SMALL,
        "dataset": str(pictures),
        "image_size": 32 if config.model_name == "tf_efficientnet_lite0" else image_size,
        "pretrained": False,
        "mixed_precision": "no",
        "loader": "auto",
        "num_workers": 0,
        "warmup_epochs": min(config.warmup_epochs, 0.5),
        "freeze_epochs": 0,
        "output_dir": str(tmp_path),
        "run_name": path.stem,
    }
    summary = train(dataclasses.replace(config, **changes))
    assert summary["status"] == "completed" and summary["steps"] == 2
    assert summary["test"]["num_samples"] == 8
