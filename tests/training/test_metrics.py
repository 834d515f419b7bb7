"""Metrics: exact sums and counts."""

import math

import pytest
import sklearn.metrics
import torch
from torch.nn.functional import cross_entropy

from pipeline.settings.batch_size import IGNORED
from pipeline.training import metrics
from pipeline.training.metrics import (
    add_batch,
    add_calibration,
    add_classes,
    balance_figures,
    calibration_error,
    class_figures,
    figures,
    roc_auc,
    uneven_sizes,
    zero_calibration,
    zero_class_counts,
    zero_sums,
)


def test_batches_of_any_size_add_up_to_the_whole():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(103, 12, generator=generator)
    labels = torch.randint(12, (103,), generator=generator)
    sums = zero_sums(torch.device("cpu"))
    for part in torch.arange(103).split(8):
        add_batch(sums, logits[part], labels[part], cross_entropy(logits[part].double(), labels[part], reduction="sum"))
    result = figures(sums)
    ranked = logits.argsort(dim=1, descending=True)
    assert result["num_samples"] == 103
    assert result["accuracy"] == (ranked[:, 0] == labels).sum().item() / 103
    assert result["top5_accuracy"] == (ranked[:, :5] == labels[:, None]).sum().item() / 103
    assert abs(result["loss"] - cross_entropy(logits.double(), labels).item()) < 1e-12


def test_ignored_samples_are_not_counted():
    logits = torch.tensor([[5.0, 0.0], [0.0, 5.0]])
    labels = torch.tensor([0, IGNORED])
    sums = zero_sums(torch.device("cpu"))
    add_batch(sums, logits, labels, cross_entropy(logits, labels, reduction="sum"))
    assert figures(sums)["num_samples"] == 1 and figures(sums)["accuracy"] == 1.0


def test_of_equal_logits_the_first_class_counts_in_accuracy_and_confusion_alike():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randint(3, (400, 12), generator=generator).float()  # ties in every row
    logits[::7] = 0.0
    labels = torch.randint(12, (400,), generator=generator)
    sums, confusion = zero_sums(torch.device("cpu")), zero_class_counts(12, torch.device("cpu"))
    bins = zero_calibration(torch.device("cpu"))
    add_batch(sums, logits, labels, torch.tensor(1.0))
    add_classes(confusion, logits, labels)
    add_calibration(bins, logits, labels)
    ranked = logits.sort(dim=1, descending=True, stable=True).indices
    result = figures(sums)
    assert result["accuracy"] == confusion.diagonal().sum().item() / 400 == bins[1].sum().item() / 400
    assert result["accuracy"] == (ranked[:, 0] == labels).sum().item() / 400
    assert result["top5_accuracy"] == (ranked[:, :5] == labels[:, None]).sum().item() / 400


def test_with_fewer_than_five_classes_top5_is_the_share_within_all():
    sums = zero_sums(torch.device("cpu"))
    add_batch(sums, torch.randn(4, 3), torch.tensor([0, 1, 2, 0]), torch.tensor(1.0))
    assert figures(sums)["top5_accuracy"] == 1.0


def test_confusion_has_true_classes_in_rows_and_gives_accuracy_per_class():
    confusion = zero_class_counts(3, torch.device("cpu"))
    logits = torch.eye(3)[torch.tensor([0, 1, 1, 0])]
    add_classes(confusion, logits, torch.tensor([0, 0, 1, 1]))
    assert confusion.tolist() == [[1, 1, 0], [1, 1, 0], [0, 0, 0]]
    found = class_figures(confusion, ["a", "b", "c"])
    per_class = found.pop("per_class")
    assert found == {"per_class_accuracy": {"a": 0.5, "b": 0.5, "c": None}, "confusion_matrix": confusion.tolist()}
    assert per_class["a"] == {"precision": 0.5, "recall": 0.5, "f1": 0.5, "num_samples": 2}
    assert per_class["c"] == {"precision": None, "recall": None, "f1": None, "num_samples": 0}


@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true")
def test_balanced_figures_are_those_of_scikit_learn():
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(200, 6, generator=generator), torch.randint(4, (200,), generator=generator)
    logits[:, 5] = -9.0  # class 5 has neither samples nor predictions, class 4 only predictions
    counts = zero_class_counts(6, torch.device("cpu"))
    for part in torch.arange(200).split(33):
        add_classes(counts, logits[part], labels[part])
    predicted = logits.argmax(1)
    assert balance_figures(counts) == {
        "balanced_accuracy": pytest.approx(sklearn.metrics.balanced_accuracy_score(labels, predicted), rel=1e-12),
        "macro_f1": pytest.approx(sklearn.metrics.f1_score(labels, predicted, average="macro"), rel=1e-12),
    }
    expected = sklearn.metrics.precision_recall_fscore_support(labels, predicted, labels=range(6), zero_division=0)
    found = class_figures(counts, list("abcdef"))["per_class"].values()
    for own, values in zip(("precision", "recall", "f1", "num_samples"), expected):
        assert [each[own] or 0 for each in found] == pytest.approx(values.tolist(), rel=1e-12)


def test_the_area_under_the_roc_curve_is_that_of_scikit_learn_also_with_ties():
    generator = torch.Generator().manual_seed(0)
    scores, labels = torch.randn(300, generator=generator), torch.randint(2, (300,), generator=generator)
    for each in (scores, (3 * scores).round(), torch.zeros(300)):
        assert roc_auc(each, labels) == pytest.approx(sklearn.metrics.roc_auc_score(labels, each), rel=1e-12)
    assert roc_auc(labels.float(), labels) == 1.0 and math.isnan(roc_auc(scores, torch.zeros(300)))


def test_classes_are_uneven_if_one_has_more_than_twice_the_samples_of_another():
    def sizes(*counts):
        return {str(number): {"num_samples": count} for number, count in enumerate(counts)}

    assert uneven_sizes(sizes(5, 10, 0)) is None and uneven_sizes(sizes(5, 11, 7)) == (5, 11) and uneven_sizes({}) is None


def test_many_classes_are_counted_each_without_a_matrix(monkeypatch):
    num_classes, generator = 5, torch.Generator().manual_seed(0)
    logits, labels = torch.randn(50, num_classes, generator=generator), torch.randint(num_classes, (50,), generator=generator)
    matrix = zero_class_counts(num_classes, torch.device("cpu"))
    add_classes(matrix, logits, labels)
    monkeypatch.setattr(metrics, "LARGEST_CONFUSION", 1)
    counts = zero_class_counts(num_classes, torch.device("cpu"))
    add_classes(counts, logits, labels)
    names = [str(number) for number in range(num_classes)]
    found = class_figures(counts, names)
    assert found == {key: value for key, value in class_figures(matrix, names).items() if key != "confusion_matrix"}
    assert balance_figures(counts) == balance_figures(matrix) and counts.shape == (5, 3)


def test_the_calibration_error_is_that_of_the_paper_bin_by_bin():
    generator = torch.Generator().manual_seed(1)
    logits = 3 * torch.randn(200, 4, generator=generator)
    labels = torch.randint(4, (200,), generator=generator)
    bins = zero_calibration(torch.device("cpu"))
    for part in torch.arange(200).split(7):
        add_calibration(bins, logits[part], labels[part])
    confidence, predicted = logits.double().softmax(dim=1).max(dim=1)
    expected = 0.0
    for number in range(15):
        inside = (confidence > number / 15) & (confidence <= (number + 1) / 15)
        if inside.any():
            gap = (predicted == labels)[inside].double().mean() - confidence[inside].mean()
            expected += inside.double().mean().item() * abs(gap.item())
    assert 0.1 < expected < 0.9 and math.isclose(calibration_error(bins), expected, rel_tol=1e-12)


def test_certain_correct_predictions_are_calibrated_and_certain_wrong_ones_are_not():
    logits = torch.tensor([[1000.0, 0.0], [0.0, 1000.0]])
    for labels, expected in (([0, 1], 0.0), ([1, 0], 1.0), ([0, 0], 0.5)):
        bins = zero_calibration(torch.device("cpu"))
        add_calibration(bins, logits, torch.tensor(labels))
        assert calibration_error(bins) == expected
    assert calibration_error(zero_calibration(torch.device("cpu"))) == 0
