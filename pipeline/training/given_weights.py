"""The start of a run from given weights: fits a classifier that starts anew, then evaluates the model as epoch 0."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast
from torch import Tensor, nn

from pipeline.common import console
from pipeline.common.randomness import permutation
from pipeline.data.image_dataset import BEFORE_TRAINING
from pipeline.data.shards import StreamedSplit
from pipeline.data.splits import Split, stratified_folds, stratified_rows
from pipeline.distributed.accelerator import largest
from pipeline.distributed.fsdp import fitted, is_sharded
from pipeline.loaders.build import EVAL_BATCH, make_loader
from pipeline.loaders.stream_loader import AnyLoader
from pipeline.models.linear_probe import NUM_FOLDS, LinearProbe, Unfittable, fit_linear_probe
from pipeline.models.timm_folder import LoadReport, starts_anew
from pipeline.optim.optimizers import classifier_names
from pipeline.settings.batch_size import first_batch_size
from pipeline.settings.config import Config
from pipeline.training.build import Parts
from pipeline.training.evaluation import evaluate, padded_batches, until_signal
from pipeline.training.run import Run
from pipeline.training.state import TrainState

HEAD_SAMPLES, HEAD_FOLDS = 7, 8  # purposes in the addresses of randomness
MOST_AT_ONCE = 64  # images per process of a batch
TOLERANCE = 1e-2  # between the model's logits and those of its classifiers, in units of the largest: bf16 rounds to 2**-8

Figures = dict[str, Any]


def start_from_given_weights(state: TrainState, parts: Parts, run: Run, head: Figures | None) -> None:
    """Evaluates and saves epoch 0. Every rank must call it. Does nothing from scratch, or for a run that resumes after epoch 0.

    head: what initialise_classifier returned; None if it was not called, which is done then.
    """
    if not run.config.has_given_weights or state.step or state.history:
        return
    if head is None:
        head = initialise_classifier(state, parts, run)
    figures = evaluate(
        state.bare_model, parts.loaders["val"], run.accelerator, signals=run.signals, loss=run.config.loss
    )
    run.read_clock(state)
    state.history.append({**state.place(0), "train_seconds": 0.0, "val": figures} | ({"head": head} if head else {}))
    run.log("val", state, 0, figures)
    text = f"epoch 0, before training: val loss {figures['loss']:.4f} accuracy {console.percent(figures['accuracy'])}"
    console.say(text, run.accelerator.is_main_process)
    run.save_figures(state)
    run.stop_if_asked(state, is_last=True)


def initialise_classifier(state: TrainState, parts: Parts, run: Run) -> Figures:
    """Fits the classifier of given weights, sets it to zero or leaves it, as head_init says; returns the figures of a fit.

    Every rank must call it. Raises ValueError if head_init is fitted and the classifier cannot be fitted.
    """
    choice, reason = classifier_start(state.bare_model, parts, run.config)
    if choice == "random":
        return {}
    if choice == "fitted":
        try:
            return fit_classifier(state, parts, run)
        except Unfittable as problem:
            if run.config.head_init == "fitted":
                raise ValueError(f"head_init fitted is not possible: {problem}. Use --head_init zero or random.") from problem
            reason = unfittable_text(problem)
    zero_heads(state)
    console.say(f"classifier set to zero{reason}", run.accelerator.is_main_process)
    return {}


def classifier_start(model: nn.Module, parts: Parts, config: Config) -> tuple[str, str]:
    """What happens to the classifier before the first step: fitted, zero or random; then why, if auto chose zero.

    With auto, fitted becomes zero if the features of the images do not allow a fit.
    """
    choice = config.head_init if config.has_given_weights else "random"
    if choice != "auto":
        return choice, ""
    if not starts_anew(model, parts.load_report, parts.dataset.class_names):
        return "random", ""
    try:
        check_fittable(model, parts.load_report)
    except Unfittable as problem:
        return "zero", unfittable_text(problem)
    return "fitted", ""


def unfittable_text(problem: Unfittable) -> str:
    return f", because it cannot be fitted: {problem}"


def fit_classifier(state: TrainState, parts: Parts, run: Run) -> Figures:
    """Fits each classifier of the model and of its moving average; returns the figures. Raises Unfittable on every rank."""
    started = time.perf_counter()
    check_fittable(state.bare_model, parts.load_report)
    probes, count = fit_heads(state, parts, run)
    for probe, name in zip(probes, classifier_names(state.bare_model)):
        write_head(state, name, probe.weight, probe.bias)
    seconds, accuracy = time.perf_counter() - started, probes[0].loo_accuracy
    text = f"classifier fitted to {count:,} images in {console.duration(seconds)}: leave-one-out accuracy "
    console.say(text + console.percent(accuracy), run.accelerator.is_main_process)
    return {"num_samples": count, "loo_accuracy": accuracy, "penalty": probes[0].penalty, "seconds": round(seconds, 3)}


def check_fittable(model: nn.Module, report: LoadReport | None) -> None:
    """Raises Unfittable if the classifiers cannot be fitted, as far as that is known without images."""
    names = classifier_names(model)
    if not names:
        raise Unfittable("timm does not name the classifier of this model")
    for name in names:
        head = model.get_submodule(name)
        if not isinstance(head, (nn.Linear, nn.Conv2d)) or isinstance(head, nn.Conv2d) and head.kernel_size != (1, 1):
            raise Unfittable(f"{name} is not one linear layer but {type(head).__name__}")
    anew = () if report is None else report.reinitialised
    drawn = [name for name, _ in model.named_parameters() if name in anew and not name.startswith(names)]
    if drawn:
        raise Unfittable(f"{drawn[0]}, which is below it, starts anew as well")


def fit_heads(state: TrainState, parts: Parts, run: Run) -> tuple[list[LinearProbe], int]:
    """A probe for each classifier, and the number of images of all processes. Every rank must call it. Raises Unfittable."""
    config, accelerator, model = run.config, run.accelerator, state.bare_model
    split = sampled(parts.dataset.train, config)
    rows_split = split.with_labels(np.arange(len(split)))  # so that the loader yields the row of each image
    loader = make_loader(config, rows_split, parts.dataset, parts.preprocessing, accelerator, training=False)
    size = config.images_at_once or min(EVAL_BATCH * first_batch_size(config), MOST_AT_ONCE)
    loader.eval_batch_size = size  # independent of the number of processes
    features, rows = classifier_inputs(model, loader, run, len(split))
    device = torch.device("cpu") if accelerator.device.type == "mps" else accelerator.device  # which has no float64
    rows = rows.to(device)
    labels = torch.from_numpy(split.labels).to(device)[rows]
    folds = stratified_folds(split.labels, NUM_FOLDS, config.seed, BEFORE_TRAINING, HEAD_FOLDS)
    probes = []

    def summed(tensor: Tensor) -> Tensor:
        run.stop_if_asked(state, is_last=True)  # the fit of many classes takes minutes
        total: Tensor = accelerator.reduce(tensor, reduction="sum")
        return total

    for name, values in zip(classifier_names(model), features):
        probe = fit_linear_probe(
            values.to(device),
            labels,
            torch.from_numpy(folds).to(device)[rows],
            len(parts.dataset.class_names),
            has_bias=model.get_submodule(name).bias is not None,
            per_class=config.loss == "bce",
            reduce=summed,
        )
        probes.append(probe)
    return probes, len(split)


def sampled(split: Split, config: Config) -> Split:
    """head_init_samples rows of the split, stratified by class; of a stream, from as few chunks as possible."""
    size = config.head_init_samples
    if len(split) <= size:
        return split
    shuffled = None
    if isinstance(split, StreamedSplit):
        _, starts = split.chunk_starts()
        chunks = permutation(len(starts) - 1, config.seed, BEFORE_TRAINING, HEAD_SAMPLES)
        shuffled = np.concatenate([np.arange(starts[chunk], starts[chunk + 1]) for chunk in chunks])
    return split.select(stratified_rows(split.labels, size, config.seed, BEFORE_TRAINING, HEAD_SAMPLES, shuffled=shuffled))


def classifier_inputs(model: nn.Module, loader: AnyLoader, run: Run, count: int) -> tuple[list[Tensor], Tensor]:
    """What each classifier receives for this rank's images, float [N, D], and the images' rows, int64 [N].

    These are the features of timm's forward_head(pre_logits=True); the classifiers of a distilled model receive different ones.
    Raises Unfittable if the model's logits are not the mean of its classifiers' outputs, as in a cosine classifier.
    """
    accelerator, was_training = run.accelerator, model.training
    heads: list[Any] = [model.get_submodule(name) for name in classifier_names(model)]
    inputs = [[torch.zeros(0, head.weight.shape[1], device=accelerator.device)] for head in heads]
    numbers, differs = [torch.zeros(0, dtype=torch.int64, device=accelerator.device)], 0
    batches = padded_batches(loader) if is_sharded(model) else loader.eval_epoch()
    model.eval()
    bar = console.progress_bar(count, 0, "features", shown=accelerator.is_main_process, unit="image")
    # eager: a compiled model would be compiled again for this pass
    with bar, torch.no_grad(), torch.compiler.set_stance("force_eager"), recorded(model) as calls:
        for images, rows in until_signal(batches, run.signals, accelerator):
            with accelerator.autocast():
                logits = model(filled(images, loader.eval_batch_size))
            outputs = torch.stack([output.flatten(1) for _, output in calls]).mean(dim=0)
            if len(numbers) == 1:
                differs = int((logits - outputs).abs().max() > TOLERANCE * outputs.abs().max())
            for values, (received, _) in zip(inputs, calls):
                values.append(received.flatten(1).float()[: len(rows)])
            numbers.append(rows)
            calls.clear()
            bar.update(len(rows) * accelerator.num_processes)
    model.train(was_training)
    if any(largest(accelerator, differs)):
        raise Unfittable("the model's logits are not the output of its last linear layer")
    return [torch.cat(values) for values in inputs], torch.cat(numbers)


def filled(images: Tensor, size: int) -> Tensor:
    """The images, repeated up to `size`: kernels round the same image differently in batches of different sizes."""
    missing = max(size - len(images), 0)
    return torch.cat([images, images[:1].expand(missing, -1, -1, -1)])


@contextmanager
def recorded(model: nn.Module) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Inside the context, each call of a classifier appends its input and output to the list."""
    calls: list[tuple[Tensor, Tensor]] = []

    def record(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        calls.append((inputs[0], output))

    hooks = [model.get_submodule(name).register_forward_hook(record) for name in classifier_names(model)]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def write_head(state: TrainState, name: str, weight: Tensor, bias: Tensor) -> None:
    """Sets a classifier of the model, and of its moving average, to rank 0's values; float64 [num_classes, D], [num_classes]."""
    values = broadcast([weight, bias])
    for model in state.models:
        head = model.get_submodule(name)
        for value, parameter in zip(values, (head.weight, head.bias)):
            if isinstance(parameter, nn.Parameter):
                write(parameter, value.reshape(parameter.shape))


@torch.no_grad()
def write(parameter: nn.Parameter, value: Tensor) -> None:
    parameter.copy_(fitted(value.to(parameter.dtype), parameter))


def zero_heads(state: TrainState) -> None:
    """Sets the last linear layer of each classifier to zero, in the model and its moving average.

    A classifier without a linear layer stays as it was drawn: the gradient of a cosine classifier is not defined at zero.
    """
    for model in state.models:
        for name in classifier_names(model):
            layers = [layer for layer in model.get_submodule(name).modules() if isinstance(layer, (nn.Linear, nn.Conv2d))]
            for parameter in layers[-1].parameters() if layers else ():
                write(parameter, torch.zeros(parameter.shape))
