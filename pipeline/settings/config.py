"""The settings of a run: one flat frozen dataclass with the limits of its values; settings/checks.py has what is refused."""

import dataclasses
import re
import typing
from pathlib import Path
from typing import Any, Literal

import yaml


def setting(default: Any, help: str, **limits: float) -> Any:
    """A field with its help text and its limits, any of above, at_least, at_most and below."""
    metadata = {"help": help, "limits": limits}
    if isinstance(default, (dict, list)):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


USUAL_EPOCHS = 8
DURATION = re.compile(r"((?P<hours>\d+(\.\d*)?)h)?((?P<minutes>\d+(\.\d*)?)m)?((?P<seconds>\d+(\.\d*)?)s?)?")

# First field of each section of --help and docs/settings.md.
SECTIONS = {
    "dataset": "Data",
    "augment": "Augmentation and loss",
    "model_name": "Model",
    "optimizer": "Optimizer",
    "scheduler": "Schedule",
    "mixed_precision": "Precision and speed",
    "output_dir": "Run",
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Every setting of a run. Where the default is null, the help sentence says what is used instead."""

    dataset: str = setting(
        "digits",
        "Images to train on: `digits` (embedded), `mnist`, `fashion_mnist`, `cifar10`, `cifar100`, `oxford_iiit_pet`, a Hub id "
        "owner/name, or a folder with class folders, images and a CSV file of labels, Parquet or Arrow files, or tar files "
        "(`loader stream` only).",
    )
    hub_config: str | None = setting(
        None, "Configuration of a Hub dataset that has several. `null` uses the dataset's default."
    )
    label_column: str | None = setting(
        None,
        "Column of the labels, for example `coarse_label` for the 20 superclasses of cifar100, or one of a CSV file. `null` "
        "finds it by its name, type and values.",
    )
    image_size: int | None = setting(
        None,
        "Height and width of the model's input in pixels. `null` uses the size of the images if all are small and the model is "
        "not pretrained, otherwise the size the model was designed for.",
        at_least=1,
    )
    val_fraction: float = setting(
        0.1,
        "Fraction of the training split that is held out for validation, stratified by class. `0` validates on the test split. "
        "A dataset with validation and test splits of its own does not need it.",
        at_least=0,
        below=1,
    )
    loader: Literal["auto", "device", "workers", "stream"] = setting(
        "auto",
        "How images are read. `device` keeps the decoded dataset in device memory. `workers` decodes images in every epoch, in "
        "worker processes. `stream` reads shards (Parquet, Arrow, tar, class folders) without downloading or holding the "
        "dataset. `auto` selects `device` for small images that fit, otherwise `workers`.",
    )
    shuffle_buffer: int = setting(
        4096,
        "With `loader stream`: number of images, over all processes, among which the order is shuffled. They are in memory, "
        "encoded.",
        at_least=1,
    )
    num_workers: int | None = setting(
        None, "Worker processes per training process that decode images. `null` uses the CPU cores, at most 8.", at_least=0
    )
    on_bad_image: Literal["error", "skip"] = setting(
        "error",
        "What to do with an image that cannot be decoded. `error` stops the run and names the image. `skip` decodes all images "
        "once before training and leaves out the bad ones.",
    )
    max_train_samples: int | None = setting(
        None,
        "Use at most this many images of the training split, stratified by class, before the validation images are taken from "
        "it. `null` uses all.",
        at_least=2,
    )
    sampler: Literal["shuffle", "balanced"] = setting(
        "shuffle",
        "Which training images an epoch takes. `shuffle` takes each once. `balanced` takes as many of each class, so it repeats "
        "images of rare classes and leaves out some of frequent ones.",
    )
    drop_last: bool = setting(True, "Drop the last batch of an epoch if it is smaller than the others.")

    augment: Literal["none", "light", "randaugment", "trivialaugment"] = setting(
        "light",
        "Augmentation of training images. `none` applies none. `light` crops and flips as suits the dataset. `randaugment` "
        "(arXiv 1909.13719) and `trivialaugment` (arXiv 2103.10158) add their operations to `light`.",
    )
    flip: bool | Literal["alternate"] | None = setting(
        None,
        "Mirror half of the training images, in every augmentation but `none`. `null` does not mirror digits and mirrors all "
        "other datasets. Set `false` for images that change their meaning, such as text or road signs. `alternate` mirrors each "
        "image in every second epoch (arXiv 2404.00498).",
    )
    random_erasing: float = setting(
        0.0, "Probability that a random rectangle of an image is erased (arXiv 1708.04896).", at_least=0, at_most=1
    )
    mixup: float = setting(
        0.0, "Parameter alpha of mixup's Beta distribution (arXiv 1710.09412). `0` disables mixup.", at_least=0
    )
    cutmix: float = setting(
        0.0, "Parameter alpha of cutmix's Beta distribution (arXiv 1905.04899). `0` disables cutmix.", at_least=0
    )
    label_smoothing: float = setting(
        0.0, "Share of each training label that is spread over all classes (arXiv 1512.00567).", at_least=0, below=1
    )
    loss: Literal["cross_entropy", "bce", "focal"] = setting(
        "cross_entropy",
        "Loss in training and evaluation. `bce` is binary cross-entropy of each class; every class of a mixed label "
        "is present (arXiv 2110.00476). `focal` lowers the loss of samples that are classified well (arXiv 1708.02002).",
    )
    class_weights: Literal["none", "balanced"] = setting(
        "none",
        "Factor on the training loss of each class. `balanced` is the mean number of training images of a class over the number "
        "of this class.",
    )

    model_name: str = setting(
        "resnet18",
        "`simple_mlp`, `small_convnet`, `small_convnet_wide`, `small_convnet_deep`, or any timm model: its name, with or without "
        "a tag, `hf-hub:owner/name`, or `local-dir:PATH`.",
    )
    pretrained: bool = setting(False, "Start from the published weights of the model.")
    stem: Literal["auto", "imagenet", "small"] = setting(
        "auto",
        "First layers of a convolutional model. `small` keeps the resolution of small images (stride 1, no pooling). `imagenet` "
        "leaves the model as it is. `auto` selects `small` for inputs of up to 64 pixels, unless the model is pretrained or "
        "`init_from` has another stem.",
    )
    init_from: str | None = setting(
        None, "Start from the weights of this run, checkpoint, timm folder or safetensors file."
    )
    head_init: Literal["auto", "fitted", "zero", "random"] = setting(
        "auto",
        "Classifier of a run with `pretrained` or `init_from`. `fitted` replaces it before the first step by a logistic "
        "regression on the features of the training images (arXiv 2202.10054). `zero` sets it to zero, `random` leaves it as it "
        "was drawn or loaded. `auto` fits it unless the weights contain it, and sets it to zero where it cannot be fitted.",
    )
    head_init_samples: int = setting(
        50_000, "Most training images that the classifier is fitted to, stratified by class.", at_least=2
    )
    drop_rate: float = setting(0.0, "Probability of dropout before the classifier.", at_least=0, below=1)
    drop_path_rate: float = setting(0.0, "Probability of stochastic depth (arXiv 1603.09382).", at_least=0, below=1)
    freeze_epochs: int = setting(0, "Train only the classifier in this many first epochs.", at_least=0)
    freeze_batchnorm: bool | None = setting(
        None,
        "Keep the running statistics of BatchNorm and normalize with them in training. `null` does so with given weights whose "
        "classifier starts anew.",
    )
    gradient_checkpointing: bool = setting(
        False, "Recompute activations in the backward pass. This saves memory and costs time."
    )

    optimizer: str = setting(
        "sgd",
        "`sgd`, `adam`, `adamw`, `muon`, or `sam`, which is `sgd` with `sam_rho` 0.05. Or an optimizer of timm such as `lamb` or "
        "`lion`: any name of `timm.optim.list_optimizers()`.",
    )
    optimizer_args: dict[str, Any] = setting(
        {},
        "Other arguments of the optimizer's constructor, for example `{betas: [0.9, 0.99]}`.",
    )
    lr: float | None = setting(
        None,
        "Peak learning rate. `null` uses the optimizer's default times sqrt(`batch_size` / 128); `pretrained` and `init_from` "
        "have smaller defaults.",
        above=0,
    )
    weight_decay: float | None = setting(
        None, "Weight decay. Norms and biases are not decayed. `null` uses the optimizer's default.", at_least=0
    )
    layer_decay: float | None = setting(
        None,
        "Factor on the learning rate from each layer to the one before it (arXiv 2106.08254). `null` trains all layers at one "
        "rate.",
        above=0,
        at_most=1,
    )
    momentum: float = setting(0.9, "Momentum of sgd and sam, and of timm's optimizers that have one.", at_least=0, below=1)
    nesterov: bool = setting(True, "Use Nesterov momentum in sgd, sam and muon.")
    muon_momentum: float = setting(0.95, "Momentum of muon, and of timm's nmuon and adamuon.", at_least=0, below=1)
    ns_steps: int = setting(5, "Number of Newton-Schulz iterations in a step of muon.", at_least=1, at_most=20)
    muon_lr_scaling: Literal["match_rms_adamw", "original"] = setting(
        "match_rms_adamw",
        "How muon scales an update by the shape of its matrix. `match_rms_adamw` (arXiv 2502.16982) gives it the RMS of a "
        "typical AdamW update. `original` needs an `lr` of 0.02 or more.",
    )
    adamw_lr_scale: float = setting(1.0, "Factor on the learning rate of muon's AdamW groups.", above=0)
    adamw_weight_decay: float | None = setting(
        None, "Weight decay of muon's AdamW groups. `null` uses `weight_decay`.", at_least=0
    )
    sam_rho: float | None = setting(
        None,
        "Radius of the perturbation of SAM (arXiv 2010.01412), with any optimizer. `0` disables SAM. `null` is 0.05 for "
        "`optimizer sam`, otherwise 0.",
        at_least=0,
    )
    sam_adaptive: bool = setting(
        False,
        "Use adaptive SAM (arXiv 2102.11600), whose perturbation scales with the weights. It needs a `sam_rho` near 2.",
    )
    sam_every: int = setting(1, "Perturb one step of every so many: 2 perturbs every second step.", at_least=1)
    sam_sync: bool = setting(
        True,
        "Compute one perturbation from the gradient of all processes. `false` lets each process use its own gradient, as in the "
        "paper.",
    )
    ema_decay: float | None = setting(
        None,
        "Decay per epoch of an exponential moving average of the weights, for example 0.5. `null` keeps no average.",
        above=0,
        below=1,
    )
    clip_grad_norm: float | None = setting(
        None, "Largest L2 norm of the gradient, which is scaled down to it. `null` does not clip.", above=0
    )

    scheduler: str = setting("cosine", "Learning-rate schedule: `constant`, `step`, `plateau`, `cosine` or `linear`.")
    warmup_epochs: float = setting(
        1.0,
        "Epochs over which the learning rate rises linearly from 0. A warm-up of more than half the run is shortened to half.",
        at_least=0,
    )
    step_epochs: float | list[float] | None = setting(
        None,
        "With `scheduler step`: a number lowers the learning rate every so many epochs, a list lowers it at these epochs. "
        "`null` lowers it after each third of the run.",
    )
    gamma: float = setting(
        0.1, "With `scheduler step` or `plateau`: factor on the learning rate each time it is lowered.", above=0, below=1
    )
    plateau_patience: int = setting(
        5,
        "With `scheduler plateau`: lower the learning rate after this many epochs in a row without a better monitored value.",
        at_least=1,
    )
    min_lr_scale: float = setting(
        0.0,
        "With `scheduler plateau`, `cosine` or `linear`: lowest learning rate, as a fraction of `lr`.",
        at_least=0,
        at_most=1,
    )
    epochs: int | None = setting(
        None,
        "Number of passes over the training split. `null` is 8, or with `time_limit` as many as fit. `0`, with `pretrained` or "
        "`init_from`, only fits the classifier.",
        at_least=0,
    )
    time_limit: float | str | None = setting(
        None,
        "Duration of the run, for example `90`, `90s`, `10m` or `1h30m`. The run measures its first steps, its validation and a "
        "checkpoint, undoes them, and trains as many epochs as fit, at most `epochs`. `null` is no limit.",
    )
    batch_size: int | None = setting(
        None,
        "Images per optimizer step, over all processes. `null` is 128, halved while an epoch has fewer than 32 steps, down to "
        "16.",
        at_least=1,
    )
    batch_size_schedule: dict[int, int] = setting(
        {},
        "New batch sizes by the number of finished epochs after which they begin, for example `{5: 256, 10: 512}`.",
    )
    batch_lr_scaling: Literal["none", "sqrt", "linear"] = setting(
        "none",
        "How the learning rate follows `batch_size_schedule`. `linear` multiplies it by the ratio of the batch sizes, `sqrt` by "
        "the square root of the ratio, `none` does not change it.",
    )
    micro_batch_size: int | Literal["auto"] | None = setting(
        None,
        "Most images per process in one forward and backward pass; gradients are accumulated. It changes which images BatchNorm "
        "normalizes together and which dropout masks are drawn. `null` is no limit. `auto` finds before training how many "
        "images fit.",
        at_least=1,
    )
    early_stopping_patience: int | None = setting(
        None,
        "Stop the run after this many epochs in a row without a better monitored value, counted as in `plateau_patience`. `null` "
        "never stops early.",
        at_least=1,
    )
    monitor: Literal["accuracy", "loss", "balanced_accuracy", "macro_f1", "roc_auc"] = setting(
        "accuracy",
        "Validation metric that decides the best epoch, `scheduler plateau` and early stopping. `roc_auc` needs two classes.",
    )

    mixed_precision: Literal["no", "fp16", "bf16"] | None = setting(
        None,
        "Precision of the forward and backward pass; `fp16` needs a GPU. `null` uses the precision of `accelerate launch`, "
        "otherwise `no`.",
    )
    channels_last: bool | None = setting(
        None,
        "Keep images and convolution weights in channels-last memory order. `null` enables it for convolutional models.",
    )
    compile: bool | Literal["reduce-overhead"] = setting(
        False,
        "Compile the model with torch.compile. `reduce-overhead` also replays each pass as a CUDA graph on a GPU.",
    )
    sync_batchnorm: bool = setting(False, "Compute BatchNorm statistics over all processes.")

    output_dir: str = setting("runs", "Folder that contains the runs.")
    run_name: str | None = setting(
        None, "Name of the run's folder in `output_dir`. `null` makes a new one from dataset, model and time."
    )
    seed: int = setting(
        0, "Seed of the validation split, data order, augmentation, initial weights and dropout.", at_least=0
    )
    resume: str = setting(
        "auto",
        "`auto` resumes `run_name` from its newest checkpoint if the run exists. `never` refuses a `run_name` that exists. The "
        "path of a checkpoint of `run_name` resumes from that one.",
    )
    checkpoint_every_steps: int | None = setting(
        None,
        "Steps between checkpoints, in addition to the checkpoint at the end of each epoch. `null` writes no others.",
        at_least=1,
    )
    keep_checkpoints: int = setting(
        1, "Number of newest checkpoints to keep. The best one is always kept besides.", at_least=1
    )
    log_with: str | list[str] | None = setting(
        None,
        "Trackers by Accelerate's names, for example `tensorboard` or `[wandb, tensorboard]`. `wandb agent` enables `wandb` "
        "without this setting.",
    )
    project: str = setting("image-classification", "Project name in the trackers.")
    log_model: bool = setting(False, "Log the folder `model/` as an artifact of the run in W&B.")
    log_every: int = setting(20, "Steps between training lines in metrics.jsonl and the trackers.", at_least=1)
    dry_run: bool = setting(False, "Print the plan and exit without training.")

    @property
    def run_dir(self) -> Path:
        return Path(self.output_dir) / str(self.run_name)

    @property
    def has_given_weights(self) -> bool:
        """Whether the run starts from published or saved weights."""
        return self.pretrained or self.init_from is not None

    @property
    def num_epochs(self) -> int:
        """epochs as a number; USUAL_EPOCHS if it is null, also as long as time_limit has not determined it."""
        return USUAL_EPOCHS if self.epochs is None else self.epochs

    @property
    def time_limit_seconds(self) -> float | None:
        """time_limit in seconds. Raises ValueError if it is not a duration above 0."""
        if self.time_limit is None:
            return None
        match = DURATION.fullmatch(str(self.time_limit).replace(" ", ""))
        units = zip(("hours", "minutes", "seconds"), (3600, 60, 1))
        seconds = sum(float(match[name] or 0) * unit for name, unit in units) if match else 0.0
        if seconds <= 0:
            raise ValueError(f"Setting time_limit {self.time_limit!r} is not a duration above 0, such as 90, 90s, 10m or 1h30m.")
        return seconds

    @property
    def uses_sam(self) -> bool:
        """Whether steps are perturbed: sam_rho is above 0, or it is null and the optimizer is sam."""
        return self.optimizer == "sam" if self.sam_rho is None else self.sam_rho > 0

    @property
    def compile_mode(self) -> str | None:
        """The mode of torch.compile; None is the default mode."""
        return None if isinstance(self.compile, bool) else self.compile

    @property
    def images_at_once(self) -> int | None:
        """micro_batch_size as a number; None if there is no limit, or if it is auto and not yet resolved."""
        return None if self.micro_batch_size == "auto" else self.micro_batch_size


DEFAULTS = Config()
FIELDS = {field.name: field for field in dataclasses.fields(Config)}
TYPES: dict[str, Any] = typing.get_type_hints(Config)


def to_yaml(config: Config) -> str:
    """The settings as YAML text that --config reads."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False)
