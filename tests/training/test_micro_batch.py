"""Memory: micro_batch_size auto finds the size that fits, and running out of memory ends with advice."""

from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from conftest import assert_close_figures, lines_of, timeless

from pipeline.common.stopping import TrainingFailed
from pipeline.images.preprocessing import Preprocessing
from pipeline.models.create import create_model
from pipeline.models.small_models import SimpleMLP
from pipeline.settings.batch_size import share_of
from pipeline.settings.config import Config
from pipeline.training.micro_batch import check_batchnorm, smallest_pass
from pipeline.training.step import Share, micro_batches


@pytest.fixture
def small_memory(monkeypatch):
    """A device that runs out of memory if a model gets more than so many images."""

    def limit_to(most):
        def limited(self, images):
            if self.training and len(images) > most:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee documentation.")
            return forward(self, images)

        monkeypatch.setattr(SimpleMLP, "forward", limited)

    forward = SimpleMLP.forward
    return limit_to


@pytest.mark.parametrize("most, found", [(99, None), (7, 4), (1, 1)])
def test_auto_finds_the_largest_micro_batch_that_fits_and_changes_nothing_else(run_training, small_memory, most, found):
    _, given = run_training(run_name="given", micro_batch_size=found)
    small_memory(most)
    _, run_dir = run_training(micro_batch_size="auto")
    assert timeless(lines_of(run_dir)) == timeless(lines_of(given))
    written = f"micro_batch_size: {'null' if found is None else found}\n"
    assert written in (run_dir / "config.yaml").read_text()


def test_a_model_that_does_not_fit_with_one_image_is_reported_before_training(run_training, small_memory, tmp_path):
    small_memory(0)
    with pytest.raises(ValueError, match="does not fit.* with a single image.*gradient_checkpointing"):
        run_training(micro_batch_size="auto")
    assert not (tmp_path / "run").exists()


def test_running_out_of_memory_reports_a_micro_batch_size_with_which_the_run_resumes(
    run_training, small_memory, tmp_path
):
    _, whole = run_training(run_name="whole", batch_size_schedule={1: 24}, micro_batch_size=6)
    small_memory(16)
    message = r"with 24 images at once \(CUDA out .*GiB.\). .*resume with --micro_batch_size 12\. .*new run"
    with pytest.raises(TrainingFailed, match=message):
        run_training(batch_size_schedule={1: 24})
    _, run_dir = run_training(batch_size_schedule={1: 24}, micro_batch_size=12)
    assert_close_figures(run_dir, whole, rel=1e-5)


def test_another_error_of_the_device_is_not_treated_as_out_of_memory(run_training, monkeypatch):
    def broken(self, images):
        if self.training:
            raise RuntimeError("device-side assert triggered")
        return forward(self, images)

    forward = SimpleMLP.forward
    monkeypatch.setattr(SimpleMLP, "forward", broken)
    for settings in ({"micro_batch_size": "auto"}, {}):
        with pytest.raises(RuntimeError, match="device-side"):
            run_training(**settings)


@pytest.mark.parametrize("size, most, parts", [(16, 5, [4, 4, 4, 4]), (17, 8, [6, 6, 5]), (8, 8, [8]), (3, None, [3])])
def test_a_share_is_split_evenly(size, most, parts):
    share = Share(torch.arange(size), torch.arange(size), size, epochs=0.1)
    found = micro_batches(share, Config(micro_batch_size=most), Accelerator(cpu=True))
    assert [len(images) for images, _ in found] == parts
    assert torch.cat([labels for _, labels in found]).equal(share.labels)


@pytest.mark.parametrize("rank, count, parts", [(0, 10, [1, 1]), (1, 10, [2, 2]), (0, 4, [0, 0]), (2, 4, [1, 1])])
def test_ranks_that_synchronize_have_equal_numbers_of_parts_and_few_empty_ones(rank, count, parts):
    """Of 10 samples three ranks have 2, 4 and 4; of 4 samples they have 0, 2 and 2."""
    accelerator = SimpleNamespace(num_processes=3, process_index=rank)
    start, stop = share_of(count, rank, 3)
    share = Share(torch.arange(max(stop - start, 1)), torch.arange(max(stop - start, 1)), count, epochs=0.1)
    config = Config(sync_batchnorm=True, micro_batch_size=3 if count == 10 else 1)
    found = micro_batches(share, config, accelerator)
    assert [len(images) for images, _ in found] == parts == [len(labels) for _, labels in found]


@pytest.mark.parametrize(
    "settings, num_samples, num_processes, smallest",
    [
        ({"batch_size": 16}, 33, 1, 16),
        ({"batch_size": 16, "drop_last": False}, 33, 1, 1),
        ({"batch_size": 16, "drop_last": False}, 35, 1, 3),
        ({"batch_size": 16, "micro_batch_size": 5}, 64, 1, 4),
        ({"batch_size": 16, "micro_batch_size": 1}, 64, 1, 1),
        ({"batch_size": 16}, 64, 4, 4),
        ({"batch_size": 4}, 64, 4, 1),  # two processes get pairs, two nothing
        ({"batch_size": 16, "batch_size_schedule": {1: 31}, "drop_last": False}, 32, 1, 1),
        ({"batch_size": 64}, 33, 1, 33),
    ],
)
def test_the_smallest_pass_of_a_run_is_known_before_it(settings, num_samples, num_processes, smallest):
    assert smallest_pass(Config(**settings), num_samples, num_processes) == smallest


def test_batchnorm_with_a_pass_of_one_image_is_refused_before_training():
    preprocessing = Preprocessing(image_size=32, channels=3, mean=(0.5,) * 3, std=(0.2,) * 3)
    accelerator = Accelerator(cpu=True)
    config = Config(model_name="resnet10t", batch_size=16, drop_last=False, stem="imagenet")

    def model_of(name):
        return create_model(name, num_classes=2, in_chans=3, image_size=32, stem="imagenet")[0]

    with pytest.raises(ValueError, match="BatchNorm of resnet10t needs at least 2 images.*33 training images.*drop_last"):
        check_batchnorm(config, model_of("resnet10t"), preprocessing, 33, accelerator)
    model = model_of("resnet10t").eval()
    before = [buffer.clone() for buffer in model.buffers()]
    check_batchnorm(config, model, preprocessing, 34, accelerator)
    check_batchnorm(config, model_of("vit_tiny_patch16_224"), preprocessing, 33, accelerator)  # it has none
    assert not model.training and all(map(torch.equal, before, model.buffers()))
