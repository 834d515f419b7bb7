"""The settings: one flat frozen dataclass, and what its values must and must not be."""

import dataclasses
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import yaml


def setting(default: Any, help: str, **limits: float) -> Any:
    """A field with its sentence for --help and its limits: any of above, at_least, at_most, below."""
    metadata = {"help": help, "limits": limits}
    if isinstance(default, (dict, list)):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


# The section of a field in --help is the last one whose first field stands at or before it.
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
    """Every setting of a run. A null default stands for a choice that the sentence explains."""

    dataset: str = setting(
        "digits",
        "digits (embedded), mnist, fashion_mnist, cifar10, cifar100, oxford_iiit_pet, a Hub id owner/name, "
        "or a folder of class folders, Parquet or Arrow files",
    )
    hub_config: str | None = setting(None, "configuration of a Hub set that has several; null takes its default")
    label_column: str | None = setting(
        None, "column of the labels, coarse_label for cifar100's 20 for example; null finds it"
    )
    image_size: int | None = setting(
        None, "side of the model's input in pixels; null takes the set's own when small, else the model's", at_least=1
    )
    val_fraction: float = setting(
        0.1,
        "fraction of the training split kept for validation, stratified; 0 validates on the test split",
        at_least=0,
        below=1,
    )
    loader: Literal["auto", "device", "workers", "stream"] = setting(
        "auto",
        "device keeps the decoded set in device memory, workers decode as they go, stream reads shards (Parquet, Arrow, tar, "
        "folders) without holding or downloading the set; auto takes device when it fits, else workers",
    )
    shuffle_buffer: int = setting(
        4096,
        "stream: images, over all processes, among which the order is shuffled; they are in memory, encoded",
        at_least=1,
    )
    num_workers: int | None = setting(
        None, "worker processes per training process that decode images; null decides from the machine", at_least=0
    )
    on_bad_image: Literal["error", "skip"] = setting(
        "error",
        "what an image that cannot be decoded does: error ends the run and names it; skip checks all images before "
        "training and leaves the bad ones out",
    )
    max_train_samples: int | None = setting(
        None, "use at most so many images of the training split, stratified, validation included", at_least=2
    )
    drop_last: bool = setting(True, "leave out an epoch's last batch when it is short")

    augment: Literal["none", "light", "randaugment", "trivialaugment"] = setting(
        "light", "light is crop and flip as fits the set; the others add arXiv 1909.13719 or 2103.10158 to it"
    )
    random_erasing: float = setting(
        0.0, "probability to erase a random rectangle, arXiv 1708.04896", at_least=0, at_most=1
    )
    mixup: float = setting(0.0, "alpha of mixup's Beta distribution, arXiv 1710.09412; 0 is off", at_least=0)
    cutmix: float = setting(0.0, "alpha of cutmix's Beta distribution, arXiv 1905.04899; 0 is off", at_least=0)
    label_smoothing: float = setting(
        0.0, "share of each training label spread over all classes, arXiv 1512.00567", at_least=0, below=1
    )

    model_name: str = setting(
        "resnet18", "simple_mlp, small_convnet(_wide) or any timm model, with its tag, hf-hub:owner/name or local-dir:PATH"
    )
    pretrained: bool = setting(False, "start from the model's published weights")
    stem: Literal["auto", "imagenet", "small"] = setting(
        "auto",
        "small keeps the resolution of small images (stride 1, no pooling); auto takes it up to 64 pixels unless pretrained",
    )
    init_from: str | None = setting(None, "a run, a timm folder or a safetensors file whose weights to start from")
    drop_rate: float = setting(0.0, "dropout before the classifier, a probability", at_least=0, below=1)
    drop_path_rate: float = setting(0.0, "stochastic depth, arXiv 1603.09382, a probability", at_least=0, below=1)
    freeze_epochs: int = setting(0, "epochs at the start in which only the classifier is trained", at_least=0)
    gradient_checkpointing: bool = setting(False, "recompute activations in the backward pass: less memory, more time")

    optimizer: str = setting("sgd", "sgd, adam, adamw, muon, or sam, which is sgd with sam_rho 0.05")
    lr: float | None = setting(
        None,
        "peak learning rate; null is the optimizer's own times the root of batch_size / 128, a tenth of it for given weights",
        above=0,
    )
    weight_decay: float | None = setting(
        None, "decay of weights other than norms and biases; null takes the optimizer's own", at_least=0
    )
    layer_decay: float | None = setting(
        None, "factor on the learning rate from each layer to the one before it, arXiv 2106.08254", above=0, at_most=1
    )
    momentum: float = setting(0.9, "momentum of sgd and sam", at_least=0, below=1)
    nesterov: bool = setting(True, "Nesterov's form of the momentum of sgd, sam and muon")
    muon_momentum: float = setting(0.95, "momentum of muon", at_least=0, below=1)
    ns_steps: int = setting(5, "Newton-Schulz steps of muon", at_least=1, at_most=20)
    muon_lr_scaling: Literal["match_rms_adamw", "original"] = setting(
        "match_rms_adamw", "how muon scales an update by its shape; original wants an lr of 0.02 and more"
    )
    adamw_lr_scale: float = setting(1.0, "factor on the learning rate of muon's AdamW groups", above=0)
    adamw_weight_decay: float | None = setting(
        None, "weight decay of muon's AdamW groups; null is weight_decay", at_least=0
    )
    sam_rho: float | None = setting(
        None,
        "radius of SAM's perturbation, arXiv 2010.01412, around any optimizer; null is 0.05 for sam, else 0",
        at_least=0,
    )
    sam_adaptive: bool = setting(
        False, "ASAM, arXiv 2102.11600: the perturbation scales with the weights; wants a rho near 2"
    )
    sam_every: int = setting(1, "a perturbed step every so many steps, plain ones between", at_least=1)
    sam_sync: bool = setting(True, "one perturbation for all processes; false is the paper's, each process its own")
    ema_decay: float | None = setting(
        None,
        "share of the weights' moving average that an epoch leaves of it, 0.5 for example; null keeps none",
        above=0,
        below=1,
    )
    clip_grad_norm: float | None = setting(None, "largest L2 norm of the gradient; null does not clip", above=0)

    scheduler: str = setting("cosine", "constant, step, plateau, cosine or linear")
    warmup_epochs: float = setting(1.0, "epochs over which the learning rate rises linearly from 0", at_least=0)
    step_epochs: float | list[float] | None = setting(
        None,
        "step: a number lowers the rate every so many epochs, a list at these epochs; null is every third of the run",
    )
    gamma: float = setting(0.1, "step and plateau: factor by which they lower the learning rate", above=0, below=1)
    plateau_patience: int = setting(
        5, "plateau: epochs without a better monitored value before it lowers the rate", at_least=1
    )
    min_lr_scale: float = setting(0.0, "plateau, cosine, linear: lowest fraction of lr", at_least=0, at_most=1)
    epochs: int = setting(8, "passes over the training split", at_least=1)
    batch_size: int | None = setting(
        None,
        "images per optimizer step, over all processes; null is 128, halved while an epoch has under 32 steps, down to 16",
        at_least=1,
    )
    batch_size_schedule: dict[int, int] = setting(
        {}, "new batch sizes by the epoch (from 0) they begin at, {5: 256, 10: 512}"
    )
    batch_lr_scaling: Literal["none", "sqrt", "linear"] = setting(
        "none", "how the learning rate follows batch_size_schedule: times the ratio's root, the ratio, or not at all"
    )
    micro_batch_size: int | Literal["auto"] | None = setting(
        None,
        "most images in memory at once per process; it changes nothing but what BatchNorm sees; null is no limit, "
        "auto tries before training how many fit",
        at_least=1,
    )
    early_stopping_patience: int | None = setting(
        None, "epochs without a better monitored value before the run stops; null never stops", at_least=1
    )
    monitor: Literal["accuracy", "loss"] = setting(
        "accuracy", "validation figure that decides best, plateau and early stopping"
    )

    mixed_precision: Literal["no", "fp16", "bf16"] | None = setting(
        None, "null takes what `accelerate launch` says, else no"
    )
    channels_last: bool | None = setting(
        None, "keep images and convolutions in channels-last order; null does for convolutional models"
    )
    compile: bool | Literal["reduce-overhead"] = setting(
        False, "compile the model with torch.compile; reduce-overhead also has a GPU replay each pass as a CUDA graph"
    )
    sync_batchnorm: bool = setting(False, "BatchNorm statistics over all processes together")

    output_dir: str = setting("runs", "folder that holds the runs")
    run_name: str | None = setting(
        None, "folder of this run below output_dir; null makes a new one from set, model and time"
    )
    seed: int = setting(0, "seed of the data order, augmentation, initial weights and dropout", at_least=0)
    resume: str = setting(
        "auto",
        "auto goes on with run_name's newest checkpoint if there is one, never refuses to, or a checkpoint's path",
    )
    checkpoint_every_steps: int | None = setting(
        None, "steps between checkpoints besides those at each epoch's end", at_least=1
    )
    keep_checkpoints: int = setting(1, "newest checkpoints to keep; the best one is kept besides", at_least=1)
    log_with: str | list[str] | None = setting(
        None,
        "trackers by Accelerate's names, tensorboard or [wandb, tensorboard]; wandb is on by itself under `wandb agent`",
    )
    project: str = setting("image-classification", "project name for the trackers")
    log_every: int = setting(20, "steps between training lines in metrics.jsonl and the trackers", at_least=1)
    dry_run: bool = setting(False, "print the plan and stop")

    @property
    def run_dir(self) -> Path:
        return Path(self.output_dir) / str(self.run_name)

    @property
    def uses_sam(self) -> bool:
        """Whether steps are perturbed: by a sam_rho, or by the name of the optimizer where sam_rho is null."""
        return self.optimizer == "sam" if self.sam_rho is None else self.sam_rho > 0

    @property
    def compile_mode(self) -> str | None:
        """The mode of torch.compile; None is its default."""
        return None if isinstance(self.compile, bool) else self.compile

    @property
    def images_at_once(self) -> int | None:
        """micro_batch_size as a number; None for no limit, and as long as auto is not filled in."""
        return None if self.micro_batch_size == "auto" else self.micro_batch_size


DEFAULTS = Config()
FIELDS = {field.name: field for field in dataclasses.fields(Config)}
TYPES: dict[str, Any] = typing.get_type_hints(Config)


def check_limits(config: Config) -> None:
    """Raises ValueError when a number is outside the limits of its field, or settings contradict one another."""
    holds = {
        "above": lambda value, bound: value > bound,
        "at_least": lambda value, bound: value >= bound,
        "at_most": lambda value, bound: value <= bound,
        "below": lambda value, bound: value < bound,
    }
    for name, field in FIELDS.items():
        value = getattr(config, name)
        for word, bound in field.metadata["limits"].items():
            if isinstance(value, (int, float)) and not holds[word](value, bound):
                raise ValueError(f"Setting {name} is {value}; it must be {word.replace('_', ' ')} {bound}.")
    for wrong, message in contradictions(config):
        if wrong:
            raise ValueError(message)


def contradictions(config: Config) -> Iterable[tuple[bool, str]]:
    schedule = config.batch_size_schedule
    steps = config.step_epochs if isinstance(config.step_epochs, list) else [config.step_epochs or 1.0]
    yield config.pretrained and config.init_from is not None, (
        "pretrained and init_from both say where the weights start from; leave one of them out."
    )
    yield config.warmup_epochs >= config.epochs and config.warmup_epochs > 0 and config.warmup_epochs != DEFAULTS.warmup_epochs, (
        f"warmup_epochs {config.warmup_epochs} must be below epochs {config.epochs}, or the learning rate never reaches lr."
    )
    yield any(epoch < 1 or size < 1 for epoch, size in schedule.items()), (
        f"batch_size_schedule {schedule} must map epochs from 1 on to batch sizes from 1 on; batch_size is that of epoch 0."
    )
    yield any(epoch >= config.epochs for epoch in schedule), (
        f"batch_size_schedule {schedule} begins a size at or after the run's end, epochs {config.epochs}."
    )
    yield config.loader == "stream" and config.on_bad_image == "skip", (
        "on_bad_image skip looks at every image before training, which a stream does not; mend the set, or take loader workers."
    )
    yield config.compile_mode is not None and (config.micro_batch_size is not None or config.uses_sam), (
        "compile reduce-overhead replays one pass a step into the same memory; micro_batch_size and SAM take several. "
        "Use compile true."
    )
    yield any(step <= 0 for step in steps) or steps != sorted(steps), (
        f"step_epochs {config.step_epochs} must be above 0, and rising when it is a list."
    )
    yield config.run_name is not None and Path(config.run_name).name != config.run_name, (
        f"run_name {config.run_name!r} must be a plain folder name; output_dir holds the path."
    )


def ignored_settings(config: Config) -> list[str]:
    """A sentence for each setting that was changed and that another one leaves without effect."""
    needs = {
        "gamma": ("scheduler step or plateau", config.scheduler in ("step", "plateau")),
        "step_epochs": ("scheduler step", config.scheduler == "step"),
        "plateau_patience": ("scheduler plateau", config.scheduler == "plateau"),
        "min_lr_scale": ("scheduler plateau, cosine or linear", config.scheduler in ("plateau", "cosine", "linear")),
        "batch_lr_scaling": ("a batch_size_schedule", bool(config.batch_size_schedule)),
        "shuffle_buffer": ("loader stream", config.loader == "stream"),
        "num_workers": ("loader workers", config.loader != "device"),
    }
    return [
        f"{name} {getattr(config, name)} has no effect: it needs {need}."
        for name, (need, met) in needs.items()
        if not met and getattr(config, name) != getattr(DEFAULTS, name)
    ]


def to_yaml(config: Config) -> str:
    """The effective settings as YAML text that --config reads back."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False)
