"""`sampler balanced`: every class equally often, every image of a class equally often, as a function of (seed, epoch)."""

import numpy as np
import pytest
import torch

from pipeline.data.splits import Split
from pipeline.images.augment import BatchTransform
from pipeline.images.preprocessing import Preprocessing
from pipeline.loaders.balanced_order import balanced_order, earlier_occurrences
from pipeline.loaders.loader import Loader

LABELS = np.array([0] * 70 + [1] * 20 + [3] * 11)[np.random.default_rng(0).permutation(101)]  # class 2 has no images


def rows_of(epoch, seed=0):
    return balanced_order(LABELS, seed, epoch) % len(LABELS)


def test_every_class_is_drawn_equally_often_in_every_epoch():
    for epoch in range(7):
        counts = np.bincount(LABELS[rows_of(epoch)])
        assert counts.sum() == 101 and set(counts[[0, 1, 3]]) <= {33, 34} and counts[2] == 0


def test_over_several_epochs_the_images_of_a_class_are_drawn_equally_often():
    for num_epochs in (1, 3, 10):
        counts = np.bincount(np.concatenate([rows_of(epoch) for epoch in range(num_epochs)]), minlength=101)
        for number in (0, 1, 3):
            own = counts[LABELS == number]
            assert own.max() - own.min() <= 1 and own.sum() // num_epochs in (33, 34)


def test_it_depends_on_seed_and_epoch_only():
    assert np.array_equal(balanced_order(LABELS, 3, 5), balanced_order(LABELS.copy(), 3, 5))
    orders = [balanced_order(LABELS, seed, epoch).tolist() for seed, epoch in ((3, 5), (3, 6), (4, 5))]
    assert len({tuple(order) for order in orders}) == 3


def test_a_repetition_counts_how_often_the_image_came_before():
    order = balanced_order(LABELS, 0, 0)
    assert len(set(order.tolist())) == 101 and order.max() // 101 == 3  # 33 or 34 draws of 11 images
    values = np.array([5, 5, 1, 5, 1])
    assert earlier_occurrences(values).tolist() == [0, 1, 0, 2, 1]


class Pictures:
    """A source of images that are their row in every pixel."""

    def load(self):
        pass

    def batches(self, epoch, rows_of_batches):
        for rows in rows_of_batches:
            yield torch.from_numpy(rows % 101).to(torch.uint8)[:, None, None, None].expand(-1, 1, 16, 16).clone()


def make_loader(rank=0, num_processes=1):
    preprocessing = Preprocessing(16, 1, (0.0,), (1 / 255,), "bilinear", 1.0, source_size=16)
    transform = BatchTransform(preprocessing, device=torch.device("cpu"), augment="none", flip=False, seed=0)
    split = Split.__new__(Split)
    split.labels = LABELS
    where = {"device": torch.device("cpu"), "rank": rank, "num_processes": num_processes, "seed": 1}
    return Loader(split, Pictures(), transform, sampler="balanced", num_classes=4, eval_batch_size=8, **where)


@pytest.mark.parametrize("num_processes", [2, 4])
def test_processes_share_the_batches_of_one_process_and_an_epoch_resumes_at_any_batch(num_processes):
    whole = list(make_loader().train_epoch(2, 16, 6))
    shares = [list(make_loader(rank, num_processes).train_epoch(2, 16, 6)) for rank in range(num_processes)]
    for batch, (images, labels) in enumerate(whole):
        assert torch.equal(torch.cat([share[batch][0] for share in shares]), images)
        assert torch.equal(torch.cat([share[batch][1] for share in shares]), labels)
        assert labels.tolist() == LABELS[images[:, 0, 0, 0].round().long()].tolist()
    rest = list(make_loader().train_epoch(2, 16, 6, first_batch=4))
    assert len(rest) == 2 and all(torch.equal(ours[0], theirs[0]) for ours, theirs in zip(rest, whole[4:]))
