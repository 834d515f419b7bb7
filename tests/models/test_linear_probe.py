"""The linear classifier fitted to features: equal to scikit-learn's, with exact leave-one-out predictions."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from pipeline.models import linear_probe
from pipeline.models.linear_probe import (
    NUM_FOLDS,
    Rotated,
    Unfittable,
    fit_linear_probe,
    fit_ridge,
    leave_one_out,
    moments,
)

CLASSES = 4


def samples(number=200, dimension=30, seed=0):
    """Features of overlapping classes, on scales from 0.01 to 100 and far from zero; labels; folds."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(number) % CLASSES
    centres = torch.randn(CLASSES, dimension, generator=generator) * 0.6
    features = centres[labels] + torch.randn(number, dimension, generator=generator)
    return features * torch.logspace(-2, 2, dimension) + 3, labels, torch.arange(number) // CLASSES % NUM_FOLDS


def standardised(features, has_bias=True):
    mean, std = moments(features, len(features), has_bias, lambda tensor: tensor)
    return ((features.double() - mean) / std).numpy()


@pytest.mark.parametrize("number, dimension", [(200, 30), (40, 90)], ids=["more samples", "more features"])
@pytest.mark.parametrize("has_bias", [True, False])
def test_it_is_the_logistic_regression_of_scikit_learn(number, dimension, has_bias):
    features, labels, folds = samples(number, dimension)
    probe = fit_linear_probe(features, labels, folds, CLASSES, has_bias)
    inputs = standardised(features, has_bias)
    theirs = LogisticRegression(C=1 / probe.penalty, fit_intercept=has_bias, tol=1e-10, max_iter=10_000)
    expected = theirs.fit(inputs, labels.numpy()).predict_proba(inputs)
    ours = (features.double() @ probe.weight.T + probe.bias).softmax(dim=1).numpy()
    assert np.abs(ours - expected).max() < 1e-5
    assert has_bias or not probe.bias.any()


def test_for_sigmoids_it_is_the_binary_logistic_regression_of_each_class():
    features, labels, folds = samples()
    probe = fit_linear_probe(features, labels, folds, CLASSES, per_class=True)
    inputs = standardised(features)
    ours = (features.double() @ probe.weight.T + probe.bias).sigmoid().numpy()
    for number in range(CLASSES):
        theirs = LogisticRegression(C=1 / probe.penalty, tol=1e-10, max_iter=10_000).fit(inputs, (labels == number).numpy())
        assert np.abs(ours[:, number] - theirs.predict_proba(inputs)[:, 1]).max() < 1e-5


def test_the_penalty_is_that_of_the_smallest_cross_validated_log_loss():
    features, labels, folds = samples()
    probe = fit_linear_probe(features, labels, folds, CLASSES)
    inputs = standardised(features)

    def held_out_loss(penalty):
        total = 0.0
        for fold in range(NUM_FOLDS):
            used = (folds != fold).numpy()
            model = LogisticRegression(C=1 / penalty, tol=1e-8, max_iter=10_000).fit(inputs[used], labels[used].numpy())
            chances = model.predict_proba(inputs[~used])
            total -= np.log(chances[np.arange(len(chances)), labels.numpy()[~used]]).sum()
        return total

    losses = {penalty: held_out_loss(penalty) for penalty in linear_probe.PENALTIES}
    assert probe.penalty == min(losses, key=losses.get)


@pytest.mark.parametrize("has_bias", [True, False])
def test_leave_one_out_predictions_are_those_of_a_fit_without_the_sample(has_bias, monkeypatch):
    features, labels, folds = samples(24, 10)
    monkeypatch.setattr(linear_probe, "RIDGE_PENALTIES", [0.1])
    inputs = torch.from_numpy(standardised(features, has_bias))
    values, axes = torch.linalg.eigh(inputs.T @ inputs)
    _, predicted = fit_ridge(Rotated(inputs @ axes, labels, values, 24, CLASSES, has_bias, lambda tensor: tensor))
    columns = torch.cat([inputs, torch.ones(24, 1, dtype=torch.float64)], dim=1) if has_bias else inputs
    penalty = torch.diag(torch.tensor([0.1 * 24] * 10 + [0.0] * has_bias, dtype=torch.float64))
    targets = torch.nn.functional.one_hot(labels, CLASSES).double()
    for left_out in range(24):
        kept = torch.arange(24) != left_out
        moment = columns[kept].T @ targets[kept]
        weights = torch.linalg.solve(columns[kept].T @ columns[kept] + penalty, moment)
        torch.testing.assert_close(predicted[left_out], columns[left_out] @ weights)


def test_leave_one_out_probabilities_are_calibrated_and_give_the_accuracy():
    features, labels, folds = samples(400)
    probabilities, accuracy = leave_one_out(features, labels, CLASSES)
    confidence, predicted = probabilities.max(dim=1)
    right = (predicted == labels).double()
    assert accuracy == right.mean().item() == fit_linear_probe(features, labels, folds, CLASSES).loo_accuracy
    assert 0.6 < accuracy < 1 and abs(confidence.mean() - right.mean()) < 0.05
    more, same_accuracy = leave_one_out(features, labels + (labels >= 2), CLASSES + 1)  # class 2 has no samples
    assert torch.equal(more[:, [0, 1, 3, 4]], probabilities) and not more[:, 2].any() and same_accuracy == accuracy


def test_a_class_without_samples_is_never_predicted_and_does_not_change_the_others():
    features, labels, folds = samples()
    few = fit_linear_probe(features, labels, folds, CLASSES)
    more = fit_linear_probe(features, labels + (labels >= 2), folds, CLASSES + 1)
    others = [0, 1, 3, 4]
    assert torch.equal(more.weight[others], few.weight) and torch.equal(more.bias[others], few.bias)
    assert not more.weight[2].any() and more.bias[2] == few.bias.min()


def test_constant_features_get_finite_weights():
    features, labels, folds = samples()
    features[:, 3], features[:, 5] = 0.0, 7.0
    probe = fit_linear_probe(features, labels, folds, CLASSES)
    assert probe.weight.isfinite().all() and probe.weight[:, [3, 5]].abs().max() < 1e-6


FAULTS = {"one class": "fewer than two", "nan": "not finite", "equal": "features of all images are equal", "zero": "equal"}


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("fault, message", FAULTS.items(), ids=FAULTS)
def test_what_cannot_be_fitted_is_refused(fault, message, has_bias):
    features, labels, folds = samples()
    if fault == "nan":
        features[7, 2] = torch.nan
    elif fault in ("equal", "zero"):
        features = features[:1].expand_as(features) * (fault == "equal")
        has_bias = has_bias or fault == "equal"  # without a bias, equal features still have a direction
    with pytest.raises(Unfittable, match=message):
        fit_linear_probe(features, labels * (fault != "one class"), folds, CLASSES, has_bias)


def test_a_process_without_samples_takes_part():
    features, labels, folds = samples(60, 10)
    sums = []

    def record(tensor):
        sums.append(tensor.clone())
        return tensor

    def add(tensor):
        return tensor + sums.pop(0)

    whole = fit_linear_probe(features, labels, folds, CLASSES, has_bias=False, reduce=record)
    empty = fit_linear_probe(features[:0], labels[:0], folds[:0], CLASSES, has_bias=False, reduce=add)
    assert torch.equal(empty.weight, whole.weight)
    assert empty.loo_accuracy == whole.loo_accuracy
