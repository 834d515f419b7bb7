"""Recipes: each opens with its command, is made of settings that exist, and takes its first steps."""

import dataclasses

import pytest
from conftest import ROOT

from pipeline.settings.parser import read_config

RECIPES = sorted((ROOT / "pipeline" / "recipes").glob("*.yaml"))
# What makes a first step small: tiny data, and for deep models few and small pictures.
SMALL = {"dataset": "digits", "max_train_samples": 64, "val_fraction": 0.5, "epochs": 1, "batch_size": 16}


def test_the_recipes_are_there():
    assert len(RECIPES) >= 12


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_opens_with_its_command_and_is_in_the_readme(path):
    first, second, *_ = path.read_text().splitlines()
    assert first.startswith("# ") and f"train.py --config pipeline/recipes/{path.name}" in first
    assert "Hardware" in second or "Hardware" in first
    assert path.name in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_takes_its_first_steps(path, tmp_path):
    """On the embedded digits, without published weights and on the CPU's precision; all else as it stands."""
    from pipeline.training.loop import train

    config = read_config(["--config", str(path)])
    image_size = 16 if (config.image_size or 0) > 32 else None
    changes = {
        **SMALL,
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
    assert summary["test"]["num_samples"] == 359
