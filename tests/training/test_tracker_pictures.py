"""Pictures in the trackers at the end of a run: confusion matrix, most confident mistakes, samples.png, and W&B's model."""

import io
import json

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import flags, torchrun
from PIL import Image

from pipeline.images.preprocessing import Preprocessing
from pipeline.training.confident_mistakes import NUM_MISTAKES, ConfidentMistakes
from pipeline.training.samples import samples_path
from pipeline.training.tracker_pictures import label_pairs

GREY = Preprocessing(8, 1, (0.5,), (0.5,))


@pytest.mark.parametrize("sizes", [(100,), (7, 30, 63), (1,) * 100])
def test_the_most_confident_mistakes_do_not_depend_on_the_batches(sizes):
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(100, 5, generator=generator) * 3, torch.randint(5, (100,), generator=generator)
    images = torch.arange(100.0)[:, None, None, None].expand(100, 1, 8, 8) / 255 * 2 - 1  # its number in every pixel
    mistakes = ConfidentMistakes()
    for batch in zip(*(part.split(list(sizes)) for part in (images, logits, labels))):
        mistakes.add(*batch)
    found = mistakes.gathered(GREY, Accelerator(cpu=True))
    confidence, predicted = logits.softmax(dim=1).max(dim=1)
    wrong = [row for row in confidence.argsort(descending=True).tolist() if predicted[row] != labels[row]]
    assert len(wrong) > NUM_MISTAKES == len(found)
    assert [int(mistake.picture[0, 0, 0]) for mistake in found] == wrong[:NUM_MISTAKES]
    assert [mistake.true for mistake in found] == labels[wrong[:NUM_MISTAKES]].tolist()
    assert [mistake.predicted for mistake in found] == predicted[wrong[:NUM_MISTAKES]].tolist()
    assert [mistake.confidence for mistake in found] == pytest.approx(confidence[wrong[:NUM_MISTAKES]].tolist())


def test_an_evaluation_without_mistakes_has_none_to_show():
    mistakes = ConfidentMistakes()
    assert mistakes.gathered(GREY, Accelerator(cpu=True)) == []
    mistakes.add(torch.zeros(2, 1, 8, 8), torch.eye(2), torch.arange(2))
    assert mistakes.gathered(GREY, Accelerator(cpu=True)) == []


def test_the_labels_of_a_confusion_matrix_give_the_matrix_again():
    counts = np.array([[3, 0, 1], [0, 0, 2], [5, 0, 0]])
    again = np.zeros_like(counts)
    np.add.at(again, tuple(label_pairs(counts)), 1)
    assert np.array_equal(again, counts)


def test_tensorboard_receives_the_pictures(finished_run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    summary, run_dir = finished_run(log_with="tensorboard")
    events = EventAccumulator(str(run_dir / "tensorboard"), {"images": 0}).Reload()
    assert set(events.Tags()["images"]) == {"first_batch", "test/confusion_matrix", "test/mistakes"}
    received = {tag: events.Images(tag)[0] for tag in events.Tags()["images"]}
    assert {event.step for event in received.values()} == {summary["steps"]}
    samples = Image.open(io.BytesIO(received["first_batch"].encoded_image_string))
    assert np.array_equal(np.asarray(samples), np.asarray(Image.open(samples_path(run_dir))))
    assert received["test/confusion_matrix"].width > 300 and received["test/mistakes"].width == 4 * (96 + 8) + 8


@pytest.mark.slow
def test_two_processes_send_the_mistakes_and_the_matrix_of_one(finished_run, tmp_path):
    """samples.png is the share of the first process: the first half of the batch."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    _, one = finished_run(log_with="tensorboard")
    done = torchrun(2, *flags(output_dir=tmp_path / "two", log_with="tensorboard"))
    assert done.returncode == 0, done.stderr
    pictures = []
    for run_dir in (one, tmp_path / "two" / "run"):
        events = EventAccumulator(str(run_dir / "tensorboard"), {"images": 0}).Reload()
        tags = ("test/mistakes", "test/confusion_matrix")
        pictures.append([event.encoded_image_string for tag in tags for event in events.Images(tag)])
    assert pictures[0] == pictures[1] and len(pictures[0]) == 2
    alone, shared = (np.asarray(Image.open(samples_path(each))) for each in (one, tmp_path / "two" / "run"))
    assert alone.shape[0] > shared.shape[0] and np.array_equal(alone[: shared.shape[0]], shared)


class StandIn:
    """A W&B run that remembers what it is given."""

    id, config, step = "abc123", {}, 0

    def __init__(self):
        self.summary, self.rows, self.artifacts = {}, {}, []

    def log(self, values, step, **kwargs):
        self.rows.setdefault(step, {}).update(values)

    def log_artifact(self, artifact):
        self.artifacts.append(artifact)

    def finish(self, exit_code):
        pass


@pytest.fixture
def wandb_run(monkeypatch):
    import wandb

    run = StandIn()
    monkeypatch.setattr(wandb, "init", lambda **options: run)
    monkeypatch.setattr(wandb, "config", type("Settings", (), {"update": lambda self, values, **kwargs: None})())
    return run


@pytest.mark.parametrize("log_model", [False, True])
def test_wandb_receives_pictures_tables_the_model_and_a_summary_to_rank_by(run_training, wandb_run, log_model):
    summary, run_dir = run_training(log_with="wandb", log_model=log_model)
    last = wandb_run.rows[summary["steps"]]
    table = last["test/per_class_accuracy"]
    assert table.columns == ["class", "accuracy"]
    assert dict(table.data) == summary["test"]["per_class_accuracy"] and len(table.data) == 10
    cells = last["test/confusion_matrix"].table.data
    assert np.array_equal(np.reshape([count for *_, count in cells], (10, 10)), summary["test"]["confusion_matrix"])
    wrong = sum(map(sum, summary["test"]["confusion_matrix"])) - np.trace(summary["test"]["confusion_matrix"])
    assert len(last["test/mistakes"]) == min(NUM_MISTAKES, wrong) > 0
    assert all(picture.image.size == (8, 8) and "true: " in picture._caption for picture in last["test/mistakes"])
    assert np.array_equal(np.asarray(last["first_batch"].image), np.asarray(Image.open(samples_path(run_dir))))
    assert [artifact.name for artifact in wandb_run.artifacts] == ["model-abc123"] * log_model
    for artifact in wandb_run.artifacts:
        assert artifact.type == "model"
        assert artifact.manifest.entries.keys() == {path.name for path in (run_dir / "model").iterdir()}
    best = {key: wandb_run.summary[f"best/{key}"] for key in ("accuracy", "loss", "epoch")}
    assert best == {key: summary["best"][key] for key in best}
    assert wandb_run.summary["val/accuracy"] == best["accuracy"] and wandb_run.summary["val/loss"] == best["loss"]


def test_with_a_moving_average_the_summary_has_the_figures_of_the_weights_that_are_best(run_training, wandb_run):
    summary, _ = run_training(log_with="wandb", ema_decay=0.9, lr=0.2)
    prefix = {"model": "val/", "ema": "val/ema_"}[summary["best"]["weights"]]
    assert wandb_run.summary[f"{prefix}accuracy"] == summary["best"]["accuracy"]


def test_a_tracker_that_refuses_pictures_costs_a_warning_and_keeps_its_summary(run_training, wandb_run, monkeypatch):
    def refuse(self, artifact):
        raise ConnectionError("the storage is down")

    monkeypatch.setattr(StandIn, "log_artifact", refuse)
    with pytest.warns(UserWarning, match="wandb could not log the pictures.*the storage is down"):
        summary, run_dir = run_training(log_with="wandb", log_model=True)
    assert wandb_run.summary["test/accuracy"] == summary["test"]["accuracy"]
    assert json.loads((run_dir / "summary.json").read_text())["status"] == "completed"
