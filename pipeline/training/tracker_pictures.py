"""What trackers receive at the end of a run: confusion matrix, most confident mistakes, samples.png, and W&B the model."""

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from pipeline.distributed.accelerator import largest
from pipeline.pages.confusion import LARGEST_MATRIX, confusion_matrix
from pipeline.pages.sheet import contact_sheet
from pipeline.training.confident_mistakes import PicturedMistake
from pipeline.training.run import Run
from pipeline.training.samples import samples_path

LARGEST_CHART = 100  # classes of W&B's confusion matrix: a chart shows at most 10,000 rows of its table
COLUMNS = 4  # of the sheet of mistakes


def takes_pictures(run: Run) -> bool:
    """Whether rank 0 has a tracker that receives pictures. Every rank must call it."""
    external = run.tracker.external if run.tracker is not None else {}
    return bool(largest(run.accelerator, len(external.keys() & SENDERS.keys()))[0])


def send_results(
    run: Run, test: dict[str, Any], class_names: Sequence[str], mistakes: Sequence[PicturedMistake], step: int
) -> None:
    """Sends the pictures to the trackers of rank 0. A tracker that cannot receive them costs a warning.

    test: the figures of the test split, with those by class; step: the last step of the run.
    """
    if run.tracker is None:
        return
    for name in run.tracker.external.keys() & SENDERS.keys():
        at = max(step, run.tracker.first_steps.get(name, 0))
        try:
            SENDERS[name](run, run.tracker.external[name], test, class_names, mistakes, at)
        except Exception as error:  # an external service may raise anything, and must not end a run
            warnings.warn(f"{name} could not log the pictures of the run; the run folder has them. {error}", stacklevel=2)


def to_tensorboard(
    run: Run, tracker: Any, test: dict[str, Any], class_names: Sequence[str], mistakes: Sequence[PicturedMistake], step: int
) -> None:
    figure = matrix_figure(run, test, class_names)
    if figure is not None:
        tracker.writer.add_figure("test/confusion_matrix", figure, step)
    if mistakes:
        sheet = contact_sheet(
            [mistake.picture for mistake in mistakes], [mistake.lines(class_names) for mistake in mistakes], COLUMNS
        )
        tracker.writer.add_image("test/mistakes", np.asarray(sheet), step, dataformats="HWC")
    samples = samples_of(run)
    if samples is not None:
        tracker.writer.add_image("first_batch", samples, step, dataformats="HWC")


def to_wandb(
    run: Run, tracker: Any, test: dict[str, Any], class_names: Sequence[str], mistakes: Sequence[PicturedMistake], step: int
) -> None:
    import wandb

    rows = [[name, accuracy] for name, accuracy in test["per_class_accuracy"].items()]
    values: dict[str, Any] = {"test/per_class_accuracy": wandb.Table(columns=["class", "accuracy"], data=rows)}
    if "confusion_matrix" in test and len(class_names) <= LARGEST_CHART:
        true, predicted = label_pairs(np.array(test["confusion_matrix"]))
        values["test/confusion_matrix"] = wandb.plot.confusion_matrix(
            y_true=true, preds=predicted, class_names=list(class_names), title="Confusion matrix, test images"
        )
    if mistakes:
        values["test/mistakes"] = [
            wandb.Image(squeezed(mistake.picture), caption=mistake.caption(class_names)) for mistake in mistakes
        ]
    samples = samples_of(run)
    if samples is not None:
        values["first_batch"] = wandb.Image(samples, caption="first training batch")
    tracker.run.log(values, step=step)
    if run.config.log_model:
        model = wandb.Artifact(f"model-{tracker.run.id}", type="model", metadata={"run_name": run.config.run_name})
        model.add_dir(str(run.config.run_dir / "model"))
        tracker.run.log_artifact(model)


SENDERS = {"tensorboard": to_tensorboard, "wandb": to_wandb}


def squeezed(picture: np.ndarray) -> np.ndarray:
    """uint8 [H, W] of a grey picture [H, W, 1]; a picture in colour is unchanged."""
    return picture[:, :, 0] if picture.shape[2] == 1 else picture


def samples_of(run: Run) -> np.ndarray | None:
    """samples.png as uint8 [H, W, 3]; None if the run has none."""
    from PIL import Image

    path = samples_path(run.config.run_dir)
    return np.asarray(Image.open(path).convert("RGB")) if path.is_file() else None


def label_pairs(counts: np.ndarray) -> tuple[list[int], list[int]]:
    """True and predicted class of every image in a confusion matrix, int64 [num_classes, num_classes]."""
    true, predicted = np.nonzero(counts)
    times = counts[true, predicted]
    return np.repeat(true, times).tolist(), np.repeat(predicted, times).tolist()


def matrix_figure(run: Run, test: dict[str, Any], class_names: Sequence[str]) -> Any:
    """The confusion matrix as a matplotlib figure; None if it was not counted or is too large to draw."""
    if "confusion_matrix" not in test or len(class_names) > LARGEST_MATRIX:
        return None
    import matplotlib

    from pipeline.pages.figure_style import STYLE
    from pipeline.pages.fonts import escape_undrawable, families_for

    with matplotlib.rc_context(STYLE | {"font.family": families_for(class_names)}):
        drawn = confusion_matrix(np.array(test["confusion_matrix"]), class_names, str(run.config.run_name))
        if isinstance(drawn, str):
            return None
        escape_undrawable(drawn)
        return drawn
