"""Metrics: exact sums and counts."""

import torch
from torch.nn.functional import cross_entropy

from pipeline.metrics import IGNORED, add_batch, add_confusion, figures, per_class_accuracy, zero_sums


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


def test_ignored_samples_count_for_nothing():
    logits = torch.tensor([[5.0, 0.0], [0.0, 5.0]])
    labels = torch.tensor([0, IGNORED])
    sums = zero_sums(torch.device("cpu"))
    add_batch(sums, logits, labels, cross_entropy(logits, labels, reduction="sum"))
    assert figures(sums)["num_samples"] == 1 and figures(sums)["accuracy"] == 1.0


def test_with_fewer_than_five_classes_top5_is_the_share_within_all():
    sums = zero_sums(torch.device("cpu"))
    add_batch(sums, torch.randn(4, 3), torch.tensor([0, 1, 2, 0]), torch.tensor(1.0))
    assert figures(sums)["top5_accuracy"] == 1.0


def test_confusion_has_true_classes_in_rows_and_gives_accuracy_per_class():
    confusion = torch.zeros(3, 3, dtype=torch.int64)
    logits = torch.eye(3)[torch.tensor([0, 1, 1, 0])]
    add_confusion(confusion, logits, torch.tensor([0, 0, 1, 1]))
    assert confusion.tolist() == [[1, 1, 0], [1, 1, 0], [0, 0, 0]]
    assert per_class_accuracy(confusion) == [0.5, 0.5, None]
