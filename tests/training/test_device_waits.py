"""A step neither waits for its device nor mixes it with the CPU: watched on the CPU with values, on a fake GPU without."""

import contextlib
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from conftest import ROOT
from device_watch import ALLOWED, CHECKING, MixesDevices, WaitsForDevice, device_watch
from PIL import Image
from steps import batch, cpu_scaler, make_state
from timm.optim import list_optimizers
from watched_epoch import fake_gpu, given_gradients, watched_epoch

from pipeline.distributed.accelerator import make_accelerator
from pipeline.images.augment import AUGMENTS, BatchTransform, resized_parts
from pipeline.images.preprocessing import Preprocessing
from pipeline.images.randaugment import RANDAUGMENT, magnitude_bins, operate
from pipeline.inference.saved_evaluation import EvaluatedModel
from pipeline.loaders.loader import Loader
from pipeline.loaders.mixing import mix
from pipeline.models.create import create_model
from pipeline.models.linear_probe import Logistic, Rotated
from pipeline.optim.ema import create_ema, update_ema
from pipeline.optim.muon import Muon
from pipeline.optim.optimizers import OPTIMIZERS, check_optimizer_name, create_optimizer
from pipeline.optim.sam import perturbed, sharpness_norm
from pipeline.optim.timm_optimizers import constructor
from pipeline.settings.config import Config
from pipeline.training.losses import LOSSES, loss_sum
from pipeline.training.metrics import LARGEST_CONFUSION, add_classes, zero_class_counts
from pipeline.training.run import Run
from pipeline.training.step import accumulate_gradient, train_step

EVERYTHING: dict[str, Any] = {
    "optimizer": "muon", "augment": "randaugment", "flip": True, "random_erasing": 0.5, "mixup": 0.2, "cutmix": 1.0,
    "label_smoothing": 0.1, "micro_batch_size": 8, "sam_rho": 0.05, "ema_decay": 0.5, "clip_grad_norm": 1.0,
}  # fmt: skip
ROWS: dict[str, dict[str, Any]] = {
    "everything": EVERYTHING,
    "workers": {
        "loader": "workers", "num_workers": 0, "augment": "trivialaugment", "sam_rho": 0.05, "sam_adaptive": True,
        "loss": "focal", "class_weights": "balanced", "sampler": "balanced", "flip": "alternate",
    },
    "stream": {
        "loader": "stream", "num_workers": 0, "cutmix": 1.0, "freeze_epochs": 1, "max_train_samples": None, "loss": "bce",
        "class_weights": "balanced",
    },
    "photos": {
        "loader": "device", "image_size": 8, "max_train_samples": None, "augment": "light", "flip": "alternate",
        "mixup": 0.2, "loss": "focal", "freeze_batchnorm": True,
    },
}

FETCH, FIGURES = ("pipeline/training/run.py", "fetch"), ("pipeline/training/metrics.py", "figures")
CLASSES = ("pipeline/training/metrics.py", "counts_by_class")
ALL_RANKS, ROC_AUC = ("pipeline/training/evaluation.py", "from_all_ranks"), ("pipeline/training/metrics.py", "roc_auc")
SCALER, ADAMS_COUNT = ("torch/amp/grad_scaler.py", "_maybe_opt_step"), ("torch/optim/optimizer.py", "_get_value")
SCALE_LINE = ("pipeline/training/run.py", "log_training")
LOADERS_SEED = ("torch/utils/data/dataloader.py", "__init__")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """Number of classes -> a folder of 16 training and 4 test images, 8x8 pixels or photos of another shape."""

    def write(num_classes: int, shape: tuple[int, ...] = (8, 8)) -> Path:
        folder = tmp_path_factory.mktemp("pictures")
        for number in range(20):
            path = folder / ("train" if number < 16 else "test") / f"class {number % num_classes}" / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full(shape, number, np.uint8)).save(path)
        return folder

    return write


@pytest.fixture
def settings_of(pictures: Callable[[int], Path]) -> Callable[[str], dict[str, Any]]:
    def settings(row: str) -> dict[str, Any]:
        shapes: dict[str, tuple[int, ...]] = {"stream": (8, 8), "photos": (40, 48, 3)}
        return ROWS[row] | ({"dataset": str(pictures(3, shapes[row])), "val_fraction": 0.0} if row in shapes else {})

    return settings


@pytest.mark.parametrize("row", ROWS)
def test_an_epoch_reads_a_tensor_only_for_its_log_line_and_its_figures(settings_of, row):
    settings = settings_of(row)
    reads = dict(watched_epoch("cpu", **settings).reads)
    if settings.get("optimizer") == "muon":
        assert reads.pop(ADAMS_COUNT) > 0
    if settings.get("loader", "device") != "device":
        assert reads.pop(LOADERS_SEED) <= 2  # training and evaluation; with the workers' processes kept, at the first epoch
    evaluations = 2 if "ema_decay" in settings else 1
    assert reads == {FETCH: 1, FIGURES: 1 + evaluations, CLASSES: evaluations}


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set")  # torch's loader asks for a real GPU
@pytest.mark.parametrize("row", ROWS)
def test_an_epoch_on_a_fake_gpu_waits_for_no_copy_and_mixes_no_devices(settings_of, row):
    assert watched_epoch("cuda", **settings_of(row)).reads.keys() == {FETCH, FIGURES, CLASSES}


def test_decoding_in_worker_processes_and_two_classes_read_nothing_more(pictures):
    settings = {"loader": "workers", "num_workers": 1, "dataset": str(pictures(2)), "val_fraction": 0.0}
    reads = dict(watched_epoch("cpu", **settings).reads)
    assert reads.pop(ALL_RANKS) == 2 and reads.pop(ROC_AUC) < 10
    assert reads == {FETCH: 1, FIGURES: 2, CLASSES: 1, LOADERS_SEED: 2}


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_steps_of_every_optimizer_read_a_tensor_only_for_the_fp16_scaler(optimizer, scaled):
    settings: dict[str, Any] = {"ema_decay": 0.5, "clip_grad_norm": 1.0, "micro_batch_size": 4, "gradient_checkpointing": True}
    config = Config(optimizer=optimizer, sam_rho=0.05, **settings)
    state, accelerator = make_state(config, cpu_scaler() if scaled else None, dtype=torch.float32)
    share = batch(size=8, dtype=torch.float32)
    with device_watch() as watch:
        for _ in range(2):
            train_step(state, share, config, accelerator)
    is_fused = optimizer != "muon" and not (scaled and optimizer.startswith("adam"))
    assert bool(watch.reads.pop(ADAMS_COUNT, 0)) != is_fused
    assert state.step == 2 and watch.reads == ({SCALER: 2} if scaled else {})


@pytest.fixture
def fake_gpus_model() -> Any:
    """Config -> a small model with gradients on a fake GPU, under device_watch."""

    @contextlib.contextmanager
    def make(config: Config) -> Any:
        accelerator = make_accelerator(config, device="cpu")
        model, _ = create_model("simple_mlp", num_classes=3, in_chans=1, image_size=8)
        with fake_gpu(accelerator):
            given_gradients(model.to("cuda"))(None)
            yield model

    return make


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_optimizer_sam_and_moving_average_stay_on_a_fake_gpu(fake_gpus_model, optimizer):
    config = Config(optimizer=optimizer, ema_decay=0.5)
    with fake_gpus_model(config) as model:
        ema, step = create_ema(model, config), create_optimizer(model, config, "no").step
        with device_watch("cuda") as watch:
            for number, adaptive in enumerate((False, True)):
                with perturbed(model, 0.05, adaptive, sharpness_norm(model, adaptive)):
                    given_gradients(model)(None)
                step()
                update_ema(ema, model, 0.5, 0.1, number)
    assert watch.reads == {}


def test_of_timms_optimizers_those_that_wait_in_each_step_are_named_in_the_documents():
    names = sorted((name for name in list_optimizers() if name not in OPTIMIZERS and is_supported(name)), key=len)
    named = {constructor(name): name for name in reversed(names)}  # the shortest name of each
    waiting = set()
    for name in named.values():
        config = Config(optimizer=name)
        model = timm.create_model("simple_mlp", num_classes=3, in_chans=1, img_size=8, hidden_sizes=(8,))
        with fake_gpu(make_accelerator(config, device="cpu")):
            given_gradients(model.to("cuda"))(None)
            optimizer = create_optimizer(model, config, "no")
            with device_watch("cuda", only_counts=True) as watch:
                optimizer.step()  # makes the state; some copy it from the CPU
                before = watch.reads.total()
                optimizer.step()
        if watch.reads.total() > before:
            waiting.add(name)
    documents = (ROOT / "docs" / "optimizers.md").read_text()
    (line,) = re.findall(r"\*\*Waiting for the GPU\*\* in each step: ([^.]*)\.", documents)
    assert len(named) > 20 and waiting == set(re.findall(r"`(\w+)`", line))


def is_supported(name: str) -> bool:
    try:
        check_optimizer_name(name)
    except ValueError:
        return False
    return True


PHOTO = Preprocessing(image_size=6, channels=3, mean=(0.5,) * 3, std=(0.2,) * 3, kept_size=8)
GREY = Preprocessing(image_size=20, channels=3, mean=(0.5,) * 3, std=(0.2,) * 3, source_size=16, crop_pct=0.9)


@pytest.mark.parametrize("preprocessing", [PHOTO, GREY], ids=["photo", "grey"])
@pytest.mark.parametrize("flip", [True, "alternate"])
def test_transforms_of_small_images_and_photos_stay_on_a_fake_gpu(preprocessing, flip):
    accelerator = make_accelerator(Config(), device="cpu")
    channels, size = 1 if preprocessing is GREY else 3, preprocessing.fitted_size
    magnitude_bins(AUGMENTS["trivialaugment"].policy, preprocessing.source_size or preprocessing.image_size)
    with fake_gpu(accelerator):
        images = torch.zeros(5, channels, size, size, dtype=torch.uint8, device="cuda")
        transform = BatchTransform(
            preprocessing, device="cuda", augment="trivialaugment", flip=flip, random_erasing=0.5, seed=0
        )
        with device_watch("cuda") as watch:
            assert transform.train(images, np.arange(5), 1).device.type == "cuda"
            transform.eval(images)
    assert watch.reads == {}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_operation_of_randaugment_stays_on_its_device(device, channels):
    names = np.array([operation.name for operation in RANDAUGMENT.operations])
    with fake_gpu(make_accelerator(Config(), device="cpu")) if device == "cuda" else contextlib.nullcontext():
        images = torch.zeros(len(names), channels, 8, 8, dtype=torch.uint8, device=device)
        with device_watch(device) as watch:
            operate(images, names, np.full(len(names), 0.5, np.float32))
    assert len(names) > 10 and watch.reads == {}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("loss", LOSSES)
def test_losses_mirrored_evaluation_and_the_fitted_classifier_stay_on_their_device(device, loss):
    """Of the classifier's fit only the losses of the samples: L-BFGS itself reads their sum in each iteration."""
    model, _ = create_model("simple_mlp", num_classes=3, in_chans=1, image_size=8)
    with fake_gpu(make_accelerator(Config(), device="cpu")) if device == "cuda" else contextlib.nullcontext():
        model = EvaluatedModel(model.to(device), torch.zeros(3, dtype=torch.int64, device=device), flip=True, loss=loss)
        images, labels = torch.zeros(2, 1, 8, 8, device=device), torch.zeros(2, dtype=torch.int64, device=device)
        logits, mixed, weights = torch.zeros(2, 3, device=device), torch.zeros(2, 3, device=device), torch.ones(3, device=device)
        values = torch.zeros(2, 4, dtype=torch.float64, device=device)
        rotated = Rotated(values, labels, values[0], 2, 3, True, reduce=lambda tensor: tensor)
        with device_watch(device) as watch:
            for target in (labels, mixed):
                for given in (None, weights):
                    loss_sum(logits, target, loss, 0.1, given)
            with torch.inference_mode():
                model(images)
            if device == "cuda":  # on a CPU, one_hot checks the labels
                solutions = torch.zeros(2, 5, 3, dtype=torch.float64, device=device)
                Logistic(rotated, labels, (0, 1), loss == "bce").losses(values, labels, solutions)
    assert watch.reads == {}


def test_every_allowed_place_is_needed(pictures):
    """Two classes, decoded for each batch, Muon with its AdamW, and a loss that is scaled as with fp16."""
    settings = {"loader": "workers", "num_workers": 0, "dataset": str(pictures(2)), "val_fraction": 0.0, "optimizer": "muon"}
    reads = watched_epoch("cpu", scaler=cpu_scaler(), **settings).reads
    assert reads.keys() == ALLOWED.keys() and reads[SCALER] == 2 and reads[SCALE_LINE] == 1


def test_a_read_in_the_backward_pass_is_found():
    weight = torch.ones(2, requires_grad=True)
    weight.register_hook(lambda gradient: gradient * gradient.sum().item())
    with pytest.raises(WaitsForDevice, match="_local_scalar_dense"), device_watch():
        weight.square().sum().backward()


@pytest.mark.parametrize("name", CHECKING, ids=str)
def test_operations_that_check_values_inside_their_kernel_are_found(name):
    arguments = [torch.ones(4), 2] if "linalg" not in str(name) else [torch.eye(2)]
    arguments = [torch.zeros(1, dtype=torch.int32), "solve"] if "errors" in str(name) else arguments
    with pytest.raises(WaitsForDevice, match=str(name)), device_watch():
        name(*arguments, **({"is_matrix": True} if "errors" in str(name) else {}))


@pytest.mark.parametrize("num_classes", [3, LARGEST_CONFUSION + 1])
def test_counts_of_classes_stay_on_a_fake_gpu(num_classes):
    accelerator = make_accelerator(Config(), device="cpu")
    with fake_gpu(accelerator):
        counts = zero_class_counts(num_classes, accelerator.device)
        logits, labels = torch.zeros(4, num_classes, device="cuda"), torch.zeros(4, dtype=torch.int64, device="cuda")
        with device_watch("cuda") as watch:
            add_classes(counts, logits, labels)
    assert watch.reads == {}


def planted(patch: pytest.MonkeyPatch, function: Any, old: str, new: str) -> str:
    """Replaces one line of a function, in memory, until the patch is undone; returns the place as the watch names it."""
    function = inspect.unwrap(function)
    lines, first = inspect.getsourcelines(function)
    (number,) = [number for number, line in enumerate(lines) if old in line]
    lines[number] = lines[number].replace(old, new)
    path = Path(inspect.getsourcefile(function))
    block = "".join(lines) if lines[0][0] != " " else "class Planted:\n" + "".join(lines)
    module = compile("\n" * (first - 1 - (block[:5] == "class")) + block, str(path), "exec")
    (code,) = [code for code in all_code(module) if code.co_name == function.__name__]
    patch.setattr(function, "__code__", code)
    return f"{path.relative_to(ROOT)}:{first + number} in {function.__name__}"


def all_code(code: Any) -> list[Any]:
    """The code of a module and of the functions and classes in it."""
    inner = [constant for constant in code.co_consts if inspect.iscode(constant)]
    return [code] + [deeper for one in inner for deeper in all_code(one)]


# (device, function, a part of one of its lines, the part with a fault, the error)
PLANTS = [
    ("cpu", accumulate_gradient, "total += batch_loss.detach()", "total += batch_loss.item()", WaitsForDevice),
    ("cpu", update_ema, "ema.update(model)", "ema.update(model), next(model.buffers()).tolist()", WaitsForDevice),
    ("cpu", operate, "sizes = group_sizes.tolist()", "sizes = group_sizes.tolist() if values.sum() else []", WaitsForDevice),
    ("cpu", mix, "ignored = labels == IGNORED", "ignored = labels == labels[labels >= 0].new_tensor(IGNORED)", WaitsForDevice),
    ("cpu", train_step, "norm = whole(", "norm = float(", WaitsForDevice),
    ("cpu", Muon._muon_step, "updates = [", "updates = [] if torch.equal(grads[0], grads[0] + 1) else [", WaitsForDevice),
    ("cuda", sharpness_norm, "precision = ", "gradients[0].cpu(); precision = ", WaitsForDevice),
    ("cuda", Loader.eval_epoch, "own = to_device(", "own = torch.Tensor.to(", WaitsForDevice),
    ("cuda", resized_parts, "corners = to_device(", "corners = torch.Tensor.to(", WaitsForDevice),
    ("cuda", mix, "weights = weights.to(images.dtype)", "weights = weights * torch.ones(1, 8, 8)", MixesDevices),
    ("cuda", add_classes, "predicted, ones =", "labels = labels + torch.arange(len(labels)); predicted, ones =", MixesDevices),
]


@pytest.mark.parametrize("device, function, old, new, error", PLANTS, ids=[f"{row[1].__name__}-{row[0]}" for row in PLANTS])
def test_a_planted_fault_is_found_with_its_line(monkeypatch, settings_of, device, function, old, new, error):
    place = planted(monkeypatch, function, old, new)
    settings = {Loader.eval_epoch: {}, add_classes: {}, resized_parts: settings_of("photos")}.get(function, EVERYTHING)
    with pytest.raises(error, match=f"{place}: aten|{place}: Tensor"):
        watched_epoch(device, **settings)


def test_a_log_line_in_every_step_is_found(monkeypatch):
    planted(monkeypatch, Run.after_step, "if is_last or state.step % self.config.log_every == 0:", "if True:")
    assert watched_epoch("cpu").reads == {FETCH: 2, FIGURES: 2, CLASSES: 1}


def test_a_fault_that_is_caught_is_still_reported():
    with pytest.raises(WaitsForDevice, match="_local_scalar_dense"):
        with device_watch(), contextlib.suppress(AssertionError):
            torch.ones(1).item()
