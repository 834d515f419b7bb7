"""The saved folder in the hands of other libraries: transformers and timm.data give our answers."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from conftest import run_process
from PIL import Image

from pipeline.inference.saved_model import load_saved_model

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on small photos of two classes that a model can confuse, with test/ beside train/."""
    folder, generator = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for split, count in (("train", 40), ("test", 20)):
        for row in range(count):
            name = ("bright", "dark")[row % 2]
            (folder / split / name).mkdir(parents=True, exist_ok=True)
            level = 110 + 30 * (row % 2)
            pixels = np.clip(generator.normal(level, 60, (50 + row, 70, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / split / name / f"{row:02d}.png")
    settings = ["--model_name=resnet10t", "--image_size=32", "--epochs=2", "--batch_size=8", "--run_name=run"]
    done = run_process("train.py", f"--dataset={folder}", f"--output_dir={folder / 'runs'}", "--num_workers=0", *settings)
    assert done.returncode == 0, done.stderr
    (folder / "printed").write_text(done.stdout)
    return folder / "runs" / "run"


def images_of_test(run_dir: Path) -> list[Path]:
    return sorted((run_dir.parents[1] / "test").rglob("*.png"))


def test_transformers_gives_our_logits_and_names(run_dir):
    transformers = pytest.importorskip("transformers")
    saved = load_saved_model(str(run_dir))
    theirs = transformers.AutoModelForImageClassification.from_pretrained(run_dir / "model").eval()
    images = torch.randn(20, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert torch.equal(theirs(images).logits, saved.model.eval()(images))
    assert theirs.config.id2label == {0: "bright", 1: "dark"}
    classify = transformers.pipeline("image-classification", model=str(run_dir / "model"))
    answers = {path.name: classify(str(path))[0] for path in images_of_test(run_dir)}
    done = run_process("-m", "pipeline.predict", str(run_dir), str(run_dir.parents[1] / "test"), "--format=jsonl")
    ours = {Path(answer["image"]).name: answer for answer in map(json.loads, done.stdout.splitlines())}
    assert ours.keys() == answers.keys() and len(ours) == 20
    for name, answer in answers.items():
        assert ours[name]["probability"] == pytest.approx(answer["score"], abs=0.02), name  # another resizing of the photos


def test_timm_data_alone_reaches_our_test_accuracy(run_dir):
    model = timm.create_model(f"local-dir:{run_dir / 'model'}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    correct = 0
    for path in images_of_test(run_dir):
        with torch.inference_mode():
            predicted = int(model(transform(Image.open(path).convert("RGB"))[None]).argmax())
        correct += model.pretrained_cfg["label_names"][predicted] == path.parent.name
    ours = json.loads((run_dir / "summary.json").read_text())["test"]
    assert ours["num_samples"] == 20 and 0 < ours["accuracy"] == correct / 20


def test_the_line_of_the_closing_table_loads_the_model(run_dir):
    (line,) = re.findall(r"\((import .*)\)$", (run_dir.parents[1] / "printed").read_text(), re.MULTILINE)
    assert line.startswith("import timm, pipeline; ")  # the stem is ours
    done = run_process("-c", f"{line}.eval()")
    assert done.returncode == 0, done.stderr
