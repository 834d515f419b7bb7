"""samples.png: the first augmented batch of a run, written once, by rank 0, without an effect on the run."""

from pathlib import Path

import numpy as np
import torch
from conftest import lines_of
from PIL import Image

from pipeline.images.preprocessing import Preprocessing
from pipeline.pages import sheet
from pipeline.settings.batch_size import IGNORED
from pipeline.training import samples
from pipeline.training.samples import as_pictures, label_lines, samples_path, shown_first


def figures_of(run_dir: Path) -> list[dict]:
    """The lines of metrics.jsonl without what depends on the clock."""
    clocks = ("seconds", "images_per_second")
    return [{key: value for key, value in line.items() if key not in clocks} for line in lines_of(run_dir)]


def test_a_run_shows_its_first_batch_as_the_loader_made_it(run_training, monkeypatch):
    """Each tile of samples.png, reduced to the size of the input again, is the image of the batch."""
    seen = []
    original = samples.batch_png

    def noted(batch, *others):
        seen.append(batch)
        return original(batch, *others)

    monkeypatch.setattr(samples, "batch_png", noted)
    _, run_dir = run_training(cutmix=1.0)
    ((images, labels),) = seen  # of two epochs
    assert images.shape == (16, 1, 8, 8) and labels.shape == (16, 10)
    picture = np.asarray(Image.open(samples_path(run_dir)).convert("L"))
    expected = as_pictures(images, Preprocessing(8, 1, (0.3053,), (0.3758,)))
    step = sheet.SMALLEST_TILE + sheet.GAP
    height = step + 2 * sheet.LINE_HEIGHT
    for place, image in enumerate(expected):
        left, top = sheet.GAP + place % 8 * step, sheet.GAP + place // 8 * height
        tile = picture[top : top + sheet.SMALLEST_TILE, left : left + sheet.SMALLEST_TILE]
        assert np.array_equal(tile[::12, ::12], image[:, :, 0]), place
    assert len({image.tobytes() for image in expected}) == 16


def test_a_resumed_run_keeps_its_samples(run_training, finished_run, tmp_path):
    _, run_dir = finished_run()
    marked = b"of the first start"
    samples_path(run_dir).write_bytes(marked)
    (run_dir / "summary.json").unlink()
    for path in run_dir.glob("checkpoints/step-00000010"):
        for file in path.iterdir():
            file.unlink()
    summary, _ = run_training()
    assert summary["steps"] == 10 and samples_path(run_dir).read_bytes() == marked


def test_a_full_disk_costs_the_samples_and_changes_nothing_else(run_training, monkeypatch, tmp_path, capsys):
    _, usual = run_training(output_dir=str(tmp_path / "usual"))

    def refuse(path, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(samples, "write_atomically", refuse)
    _, without = run_training(output_dir=str(tmp_path / "without"))
    assert "samples.png could not be written: [Errno 28] No space left on device. Training continues." in capsys.readouterr().err
    assert samples_path(usual).is_file() and not samples_path(without).exists()
    assert figures_of(without) == figures_of(usual) and len(figures_of(usual)) > 5


def test_labels_are_shown_with_their_shares():
    names = ["cat", "dog", "\u732b"]
    assert label_lines(torch.tensor(1), names) == ["dog"]
    assert label_lines(torch.tensor(IGNORED), names) == ["(no image)"]
    assert label_lines(torch.tensor([0.25, 0.75, 0.0]), names) == ["0.75 dog", "0.25 cat"]
    assert label_lines(torch.tensor([0.998, 0.002, 0.0]), names) == ["cat"]
    assert label_lines(torch.tensor([0.0, 0.0, 1.0]), names) == ["class 2"]  # the font of the captions has no Chinese letters


def test_the_batches_after_the_shown_one_are_all_there():
    shown = []
    assert list(shown_first(iter("abc"), shown.append)) == ["a", "b", "c"] and shown == ["a"]
    assert list(shown_first(iter("abc"), None)) == ["a", "b", "c"]
