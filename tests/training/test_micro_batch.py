"""Memory: micro_batch_size auto finds the size that fits, and running out of memory ends with advice."""

import pytest
import torch
from conftest import assert_close_figures, lines_of, timeless

from pipeline.common.stopping import TrainingFailed
from pipeline.models.small_models import SimpleMLP


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
