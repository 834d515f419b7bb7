"""Losses: the papers' formulas, with mixed, smoothed and missing labels, in parts, with SAM, and in saved models."""

import json

import pytest
import torch
from sklearn.utils.class_weight import compute_class_weight
from steps import batch, make_state
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy
from torch.nn.functional import cross_entropy

from pipeline.inference.prediction import to_input
from pipeline.inference.saved_evaluation import EvaluatedModel, put_on_split
from pipeline.inference.saved_model import load_saved_model
from pipeline.optim.optimizers import set_lr
from pipeline.settings.batch_size import IGNORED
from pipeline.settings.config import Config
from pipeline.training.evaluation import evaluate
from pipeline.training.losses import GAMMA, LOSSES, balanced_weights, loss_sum, probabilities
from pipeline.training.step import Share, train_step

WEIGHTS = torch.tensor([0.5, 2.0, 1.0, 0.1], dtype=torch.float64)


def logits_and_labels(size=9):
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(size, 4, generator=generator, dtype=torch.float64)
    return logits, torch.randint(4, (size,), generator=generator)


def mixed_labels(labels, share):
    one_hot = torch.eye(4, dtype=torch.float64)[labels]
    return share * one_hot + (1 - share) * one_hot.roll(1, 0)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_bce_is_timms_and_a_mixed_label_has_both_classes(smoothing):
    logits, labels = logits_and_labels()
    reference = BinaryCrossEntropy(smoothing=smoothing, sum_classes=True, reduction="sum")
    assert torch.allclose(loss_sum(logits, labels, "bce", smoothing), len(logits) * reference(logits, labels), rtol=1e-12)
    for share, others in ((0.6, True), (0.79, True), (0.9, False)):  # a share of 0.1 is not above the threshold of 0.2
        present = (mixed_labels(labels, 1.0) + others * mixed_labels(labels, 1.0).roll(1, 0)).clamp(max=1)
        target = present * (1 - smoothing) + smoothing / 4
        expected = -(target * logits.sigmoid().log() + (1 - target) * (-logits).sigmoid().log()).sum()
        assert torch.allclose(loss_sum(logits, mixed_labels(labels, share), "bce", smoothing), expected, rtol=1e-12)


def test_focal_is_cross_entropy_with_less_weight_on_what_is_right():
    logits, labels = logits_and_labels()
    p = logits.softmax(1).gather(1, labels[:, None])
    assert torch.allclose(loss_sum(logits, labels, "focal"), (-((1 - p) ** GAMMA) * p.log()).sum(), rtol=1e-12)
    half = mixed_labels(labels, 0.5)
    parts = [loss_sum(logits, labels, "focal"), loss_sum(logits, labels.roll(1), "focal")]
    assert torch.allclose(loss_sum(logits, half, "focal"), sum(parts) / 2, rtol=1e-12)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_is_torchs_with_and_without_weights(smoothing):
    logits, labels = logits_and_labels()
    assert torch.equal(loss_sum(logits, labels, "cross_entropy"), cross_entropy(logits, labels, reduction="sum"))
    smooth = LabelSmoothingCrossEntropy(smoothing)(logits, labels) * len(logits)
    assert torch.allclose(loss_sum(logits, labels, "cross_entropy", smoothing), smooth, rtol=1e-12)
    expected = cross_entropy(logits, labels, WEIGHTS, reduction="sum", label_smoothing=smoothing)
    assert torch.equal(loss_sum(logits, labels, "cross_entropy", smoothing, WEIGHTS), expected)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_a_label_written_as_shares_is_the_same_label_and_an_ignored_one_adds_nothing(loss, weights):
    logits, labels = logits_and_labels()
    whole = loss_sum(logits, labels, loss, 0.1, weights)
    assert torch.allclose(loss_sum(logits, mixed_labels(labels, 1.0), loss, 0.1, weights), whole, rtol=1e-12)
    more, missing = torch.cat([logits, logits[:2]]), torch.tensor([IGNORED, IGNORED])
    assert torch.allclose(loss_sum(more, torch.cat([labels, missing]), loss, 0.1, weights), whole, rtol=1e-12)
    shares = torch.cat([mixed_labels(labels, 1.0), torch.zeros(2, 4, dtype=torch.float64)])
    assert torch.allclose(loss_sum(more, shares, loss, 0.1, weights), whole, rtol=1e-12)
    parts = [loss_sum(logits[part], labels[part], loss, 0.1, weights) for part in (slice(0, 4), slice(4, None))]
    assert torch.allclose(sum(parts), whole, rtol=1e-12)


@pytest.mark.parametrize("loss", LOSSES)
def test_weights_multiply_the_losses_of_their_class(loss):
    logits, labels = logits_and_labels()
    for number in range(4):
        own = labels == number
        expected = WEIGHTS[number] * loss_sum(logits[own], labels[own], loss)
        assert torch.allclose(loss_sum(logits[own], labels[own], loss, 0.0, WEIGHTS), expected, rtol=1e-12)


def test_balanced_weights_are_scikit_learns_and_average_to_one():
    labels = torch.tensor([0] * 6 + [1] * 3 + [3])
    weights = balanced_weights(labels, 5)
    present = torch.tensor([0, 1, 3])
    expected = compute_class_weight("balanced", classes=present.numpy(), y=labels.numpy())
    assert weights[present].tolist() == pytest.approx(expected.tolist()) and weights[[2, 4]].tolist() == [0, 0]
    assert weights[labels].mean().item() == pytest.approx(1)


@pytest.mark.parametrize("loss", ["bce", "focal"])
@pytest.mark.parametrize("sam_rho", [0.0, 0.05])
@pytest.mark.parametrize("mixed", [False, True])
def test_micro_batches_of_any_size_give_the_same_step(loss, sam_rho, mixed):
    weights, share = [], batch()
    labels = torch.eye(3, dtype=torch.float64)[share.labels]
    labels = 0.7 * labels + 0.3 * labels.roll(1, 0) if mixed else share.labels
    share = Share(share.images, labels, share.count, share.epochs)
    for micro_batch_size in (None, 5, 1):
        config = Config(loss=loss, sam_rho=sam_rho, micro_batch_size=micro_batch_size, label_smoothing=0.1)
        state, accelerator = make_state(config, model_name="simple_mlp")
        set_lr(state.optimizer, 0.01)
        train_step(state, share, config, accelerator)
        weights.append(torch.cat([parameter.detach().flatten() for parameter in state.model.parameters()]))
    assert all(torch.allclose(found, weights[0], rtol=1e-6, atol=1e-9) for found in weights)


def test_a_bce_model_has_a_probability_of_its_own_for_each_class_everywhere(finished_run):
    summary, run_dir = finished_run(loss="bce")
    saved, folder = load_saved_model(str(run_dir)), load_saved_model(str(run_dir / "model"))
    assert saved.loss == folder.loss == "bce"
    assert json.loads((run_dir / "model" / "config.json").read_text())["problem_type"] == "multi_label_classification"
    grey = [torch.full((1, 8, 8), 100 * n, dtype=torch.uint8) for n in range(3)]
    images = to_input(grey, saved.preprocessing, torch.device("cpu"))
    with torch.no_grad():
        logits = saved.model(images)
        assert torch.equal(probabilities(logits, saved.loss), logits.sigmoid())
        mean = (logits.sigmoid() + saved.model(images.flip(3)).sigmoid()) / 2
        flipped = EvaluatedModel(saved.model, None, flip=True, loss="bce")(images)
    assert torch.allclose(flipped.sigmoid(), mean, atol=1e-6)
    assert summary["best"]["loss"] > 0 and summary["test"]["loss"] > 0


@pytest.mark.parametrize("loss", LOSSES)
def test_the_loss_of_an_evaluation_is_that_of_the_run(finished_run, loss):
    summary, run_dir = finished_run(loss=loss, epochs=1)
    saved = load_saved_model(str(run_dir))
    on_split = put_on_split(saved, saved.config, "test")
    with torch.no_grad():
        logits, labels = map(torch.cat, zip(*((on_split.model(images), own) for images, own in on_split.loader.eval_epoch())))
    figures = evaluate(on_split.model, on_split.loader, on_split.accelerator, loss=saved.loss)
    assert figures["loss"] == summary["test"]["loss"]
    log_p, shares = logits.double().log_softmax(1), torch.eye(10, dtype=torch.float64)[labels]
    expected = {
        "cross_entropy": -log_p,
        "focal": -((1 - log_p.exp()) ** 2) * log_p,
        "bce": -logits.double().sigmoid().log() + (-logits.double().sigmoid()).log1p(),
    }[loss]
    rest = -(-logits.double().sigmoid()).log1p().sum(1) if loss == "bce" else 0
    assert figures["loss"] == pytest.approx(((expected * shares).sum(1) + rest).mean().item(), rel=1e-5)
