"""`lr`: the learning-rate range test with the settings of a run (Smith, https://arxiv.org/abs/1506.01186)."""

import itertools
import math
from argparse import Namespace
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from pipeline.benchmark.measuring import Section
from pipeline.common.console import progress_bar
from pipeline.settings.parser import read_config

if TYPE_CHECKING:
    from pipeline.training.build import Parts

DIVERGED = 4.0  # ratio of the loss's moving average to its minimum at which the test stops
SMOOTHING = 0.8  # decay of the loss's moving average per step
WIDTH = 0.03  # standard deviation of the smoothing window, as a fraction of the steps
FEWEST_STEPS = 10  # required for a suggestion
RULE = (
    "where the smoothed loss falls fastest per factor of the learning rate, before its minimum"
)


def sections(args: Namespace, settings: list[str]) -> Iterator[Section]:
    """One curve. Creates no run folder. Raises ValueError for invalid settings."""
    import torch

    from pipeline.benchmark.stepclock import device_name
    from pipeline.distributed.accelerator import make_accelerator
    from pipeline.training.build import assemble, check_settings, load_images

    if args.lr_start >= args.lr_end:
        raise ValueError(f"--lr_start {args.lr_start:g} must be below --lr_end {args.lr_end:g}.")
    config = read_config(settings)
    check_settings(config)
    accelerator = make_accelerator(config)
    parts = assemble(config, accelerator)
    load_images(parts, accelerator)
    lrs = [
        args.lr_start * (args.lr_end / args.lr_start) ** (step / max(args.num_steps - 1, 1))
        for step in range(args.num_steps)
    ]
    points = train_on(lrs, parts, accelerator)
    lrs, losses = [lr for lr, _ in points], [loss for _, loss in points]
    device = {"device": device_name(accelerator.device), "threads": torch.get_num_threads()}
    rows = [
        {"row": f"{lr:.3g}", "lr": lr, "loss": loss, "smoothed_loss": smoothed, "n": 1, **device}
        for lr, loss, smoothed in zip(lrs, losses, smooth(losses))
    ]
    found = suggestion(lrs, losses)
    title = (
        f"range test of {config.model_name} on {config.dataset}, {config.optimizer}, batch {parts.config.batch_size}"
    )
    yield Section(title, rows, notes=notes(found, len(losses), args), curve=("lr", "smoothed_loss"), mark=found)


def train_on(lrs: Sequence[float], parts: "Parts", accelerator: Any) -> list[tuple[float, float]]:
    """The learning rate and the loss of each step until the loss diverges; steps that the fp16 scaler skipped are omitted."""
    from pipeline.optim.optimizers import set_lr
    from pipeline.settings.batch_size import steps_per_epoch
    from pipeline.training.metrics import COUNT, LOSS
    from pipeline.training.state import begin_state
    from pipeline.training.step import Share, to_training_mode, train_step

    config, loader = parts.config, parts.loaders["train"]
    batch_size = config.batch_size or 1
    num_batches = steps_per_epoch(len(loader), batch_size, config.drop_last)
    state = begin_state(parts.model, parts.optimizer, accelerator, parts.ema)
    batches = itertools.chain.from_iterable(
        loader.train_epoch(epoch, batch_size, num_batches) for epoch in itertools.count()
    )
    to_training_mode(state, config, config.freeze_epochs > 0)
    points: list[tuple[float, float]] = []
    with progress_bar(len(lrs), 0, "range test", shown=True) as bar:
        for step, (lr, (images, labels)) in enumerate(zip(lrs, batches)):
            state.sums.zero_()
            set_lr(state.optimizer, lr)
            count = min(batch_size, len(loader) - step % num_batches * batch_size)
            train_step(state, Share(images, labels, count, count / len(loader)), config, accelerator)
            sums = accelerator.reduce(state.sums).tolist()
            if sums[COUNT]:
                points.append((lr, sums[LOSS] / sums[COUNT]))
            bar.update()
            if points and has_diverged([loss for _, loss in points]):
                break
    return [(lr, loss) for lr, loss in points if math.isfinite(loss)]


def smooth(losses: Sequence[float]) -> list[float]:
    """The losses smoothed by a Gaussian window, which, unlike a moving average, does not lag behind."""
    width = max(WIDTH * len(losses), 1.0)
    smoothed = []
    for centre in range(len(losses)):
        weights = [math.exp(-(((step - centre) / width) ** 2) / 2) for step in range(len(losses))]
        smoothed.append(sum(weight * loss for weight, loss in zip(weights, losses)) / sum(weights))
    return smoothed


def moving_average(losses: Sequence[float]) -> list[float]:
    """The exponential moving average of the losses, corrected for its start at 0."""
    average, averages = 0.0, []
    for number, loss in enumerate(losses, 1):
        average = SMOOTHING * average + (1 - SMOOTHING) * loss
        averages.append(average / (1 - SMOOTHING**number))
    return averages


def has_diverged(losses: Sequence[float]) -> bool:
    """Whether the last loss is not finite, or the moving average exceeds DIVERGED times its minimum."""
    if not math.isfinite(losses[-1]):
        return True
    averages = moving_average(losses)
    return len(losses) >= FEWEST_STEPS and averages[-1] > DIVERGED * min(averages)


def suggestion(lrs: Sequence[float], losses: Sequence[float]) -> float | None:
    """The learning rate of RULE, with slopes between the neighbours of a step; None without a fall or with too few steps."""
    smoothed = smooth(losses)
    if len(losses) < FEWEST_STEPS:
        return None
    lowest = min(range(len(smoothed)), key=smoothed.__getitem__)
    slopes = {
        step: (smoothed[step + 1] - smoothed[step - 1]) / math.log(lrs[step + 1] / lrs[step - 1])
        for step in range(1, min(lowest + 1, len(smoothed) - 1))
    }
    steepest = min(slopes, key=slopes.__getitem__, default=None)
    return None if steepest is None or slopes[steepest] >= 0 else lrs[steepest]


def notes(found: float | None, num_steps: int, args: Namespace) -> list[str]:
    ended = (
        f"The loss diverged after {num_steps} of {args.num_steps} steps."
        if num_steps < args.num_steps
        else f"The loss did not diverge up to a learning rate of {args.lr_end:g}."
    )
    if found is None:
        return [ended, "No suggestion: the loss did not fall. Lower --lr_start, or raise --num_steps."]
    return [ended, f"Suggested: --lr {found:.2g}, {RULE}."]
