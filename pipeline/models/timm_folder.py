"""Saves and loads timm folders (config.json, model.safetensors, README.md), and loads weights into a model."""

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from timm.models import save_for_hf
from torch import Tensor, nn

from pipeline.common.files import folder_written_aside, write_json

WEIGHTS_FILE, CONFIG_FILE, README_FILE = "model.safetensors", "config.json", "README.md"
PER_CLASS = "multi_label_classification"  # problem_type of a model whose classes have probabilities of their own


@dataclass(frozen=True)
class LoadReport:
    """The origin of each tensor of a model.

    loaded: unchanged from the source. adapted: from the source, cropped or resampled to the shape in the model. reinitialised:
    only in the model, or of another shape in the classifier. unused: only in the source. label_names: of the source's classifier,
    empty if it does not name them.
    """

    source: str
    loaded: tuple[str, ...]
    adapted: tuple[str, ...] = ()
    reinitialised: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    label_names: tuple[str, ...] = ()

    def __str__(self) -> str:
        found = len(self.loaded) + len(self.adapted)
        lines = [f"{found} of {found + len(self.reinitialised)} tensors from {self.source}"]
        for what in ("adapted", "reinitialised", "unused"):
            names = getattr(self, what)
            if names:
                more = f" and {len(names) - 6} more" if len(names) > 6 else ""
                lines.append(f"  {what}: {', '.join(names[:6])}{more}")
        return "\n".join(lines)


def classifier_names(model: nn.Module) -> set[str]:
    """The parameter names of the classifier, or classifiers, of a timm model."""
    classifiers = vars(model)["pretrained_cfg"].get("classifier") or ()
    classifiers = (classifiers,) if isinstance(classifiers, str) else classifiers
    return {f"{classifier}.{kind}" for classifier in classifiers for kind in ("weight", "bias")}


def starts_anew(model: nn.Module, report: LoadReport | None, class_names: Sequence[str]) -> bool:
    """Whether the given weights have no classifier for these classes: it has another shape, or other label names."""
    if report is None:
        return False
    is_drawn = not classifier_names(model).isdisjoint(report.reinitialised)
    return is_drawn or bool(report.label_names) and list(report.label_names) != list(class_names)


def weights_file(source: str | Path) -> Path:
    """The safetensors file of a run folder, a timm folder or a path to the file itself. Raises ValueError if there is none."""
    source = Path(source)
    if source.is_file() and source.suffix == ".safetensors":
        return source
    for folder in (source / "model", source):
        if (folder / WEIGHTS_FILE).is_file():
            return folder / WEIGHTS_FILE
    raise ValueError(
        f"No weights in {str(source)!r}. It must be a run folder (with model/{WEIGHTS_FILE}), a folder with "
        f"{WEIGHTS_FILE}, or a .safetensors file; pickled weights (.pt, .pth, .bin) are not supported."
    )


def read_config(file: Path) -> dict[str, Any]:
    """The content of a timm folder's config.json. Raises ValueError, with the path, if it is invalid."""
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read as JSON ({error}). Copy the model folder again.") from error
    if not isinstance(config, dict) or not isinstance(config.get("architecture"), str):
        raise ValueError(f"{file} has no architecture, so it is not the config of a timm model.")
    return config


def check_model_folder(folder: str | Path) -> None:
    """Raises ValueError, with the path, unless the folder has an intact config.json and model.safetensors.

    Reads only the header of the weights, which includes the length of the file.
    """
    folder = Path(folder)
    missing = [file for file in (CONFIG_FILE, WEIGHTS_FILE) if not (folder / file).is_file()]
    if missing:
        raise ValueError(f"{str(folder)!r} is not a model folder: {' and '.join(missing)} missing.")
    architecture = read_config(folder / CONFIG_FILE)["architecture"]
    if not timm.is_model(architecture):
        raise ValueError(f"{folder / CONFIG_FILE} has the architecture {architecture!r}, which timm does not have.")
    try:
        with safe_open(folder / WEIGHTS_FILE, framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise _damaged(folder / WEIGHTS_FILE, error) from error


def _damaged(file: Path, error: Exception) -> ValueError:
    return ValueError(f"{file} is not an intact safetensors file ({error}). Copy it again, or use another file.")


def load_weights(model: nn.Module, source: str | Path) -> LoadReport:
    """Loads weights into a timm model by name; returns a report.

    The classifier keeps its values if its shape differs (another number of classes). The first convolution is adapted to another
    number of input channels. Raises ValueError for any other difference in shape, for a file that shares no tensor with the
    model, and for a damaged file.
    """
    file = weights_file(source)
    try:
        found = load_file(file)
    except (SafetensorError, OSError) as error:
        raise _damaged(file, error) from error
    target, classifier = model.state_dict(), classifier_names(model)
    adapted = _adapt_first_convolutions(model, found, target)
    differing = {name for name in found if name in target and found[name].shape != target[name].shape}
    wrong = [
        f"{name} {tuple(found[name].shape)}, the model has {tuple(target[name].shape)}"
        for name in sorted(differing - classifier)
    ]
    taken = [name for name in target if name in found and name not in differing]
    loaded = tuple(name for name in taken if name not in adapted)
    if wrong:
        more = f"; and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise ValueError(
            f"{file} is of another model: {'; '.join(wrong[:5])}{more}. Set model_name, stem, image_size and the "
            "number of channels to those of the file."
        )
    if not taken:
        first, name = next(iter(found), None), config_beside(file).get("architecture", "its model")
        raise ValueError(f"{file} shares no tensor with the model; its first tensor is {first!r}. Set model_name to {name}.")
    model.load_state_dict({name: found[name] for name in taken}, strict=False)
    return LoadReport(
        source=str(file),
        loaded=loaded,
        adapted=adapted,
        reinitialised=tuple(name for name in target if name not in taken),
        unused=tuple(name for name in found if name not in target),
        label_names=label_names_of(config_beside(file)),
    )


def config_beside(file: Path) -> dict[str, Any]:
    """The content of the config.json beside a weights file; empty without it. Raises ValueError if it is invalid."""
    beside = file.with_name(CONFIG_FILE)
    return read_config(beside) if beside.is_file() else {}


def label_names_of(config: dict[str, Any]) -> tuple[str, ...]:
    """The label names in the content of a config.json, if it has any."""
    return tuple(map(str, config.get("label_names") or (config.get("pretrained_cfg") or {}).get("label_names") or ()))


def _adapt_first_convolutions(model: nn.Module, found: dict[str, Tensor], target: dict[str, Tensor]) -> tuple[str, ...]:
    """Replaces, in `found`, the weights of first convolutions with another number of input channels; returns their names.

    Each new channel gets the sum of the channels divided by their new number, so a grey image keeps its response.
    """
    stems = vars(model).get("pretrained_cfg", {}).get("first_conv") or ()
    names = [f"{stem}.weight" for stem in ((stems,) if isinstance(stems, str) else stems)]
    adapted = []
    for name in names:
        if name in found and name in target and found[name].shape != target[name].shape:
            weight, channels = found[name], target[name].shape[1]
            shared = weight.sum(dim=1, keepdim=True, dtype=torch.float32) / channels
            if shared.expand(-1, channels, *shared.shape[2:]).shape == target[name].shape:
                found[name] = shared.repeat(1, channels, *[1] * (weight.ndim - 2)).to(weight.dtype)
                adapted.append(name)
    return tuple(adapted)


def _without_repetitions(config: dict[str, Any]) -> dict[str, Any]:
    """The config.json of timm without model arguments that it repeats: transformers would pass num_classes twice and fail."""
    repeated = {"num_classes": config["num_classes"], "in_chans": 3}
    arguments = config.pop("model_args", {})
    kept = {name: value for name, value in arguments.items() if name not in repeated or value != repeated[name]}
    return config | ({"model_args": kept} if kept else {})


def load_model(folder: str | Path) -> nn.Module:
    """Loads a folder of save_model; the model is in training mode on the CPU. Raises ValueError if the folder is damaged."""
    check_model_folder(folder)
    try:
        return timm.create_model(f"local-dir:{folder}", pretrained=True)
    except RuntimeError as error:
        raise ValueError(f"{Path(folder) / WEIGHTS_FILE} does not fit its {CONFIG_FILE}: {error}") from error


def save_model(
    model: nn.Module,
    folder: Path,
    *,
    label_names: Sequence[str],
    image_size: int,
    in_chans: int,
    mean: Sequence[float],
    std: Sequence[float],
    interpolation: str,
    crop_pct: float,
    readme: str,
    source_size: int | None = None,
    grey_max: int | None = None,
    has_own_probabilities: bool = False,
) -> None:
    """Writes a folder that timm loads, after `import pipeline`, as a model with bit-identical logits.

    source_size, grey_max: as in Preprocessing; additional entries, because timm has none for them. has_own_probabilities:
    whether the probability of a class is the sigmoid of its logit, as after training with bce; written as the problem_type of
    transformers, whose pipeline applies it, too. The folder is written aside,
    synced and renamed; an existing one is replaced. Only rank 0 may call it, with the unwrapped model. Raises ValueError if the
    number of label names is not the number of classes.
    """
    if len(label_names) != model.num_classes:
        raise ValueError(f"{len(label_names)} label names for a model of {model.num_classes} classes.")
    plain = copy.deepcopy(model).cpu()
    for tensor in [*plain.parameters(), *plain.buffers()]:
        tensor.data = tensor.data.contiguous()  # safetensors rejects channels_last
    with folder_written_aside(folder) as aside:
        save_for_hf(
            plain,
            str(aside),
            model_config={
                "label_names": list(label_names),
                "source_size": source_size,
                "grey_max": grey_max,
                **({"problem_type": PER_CLASS} if has_own_probabilities else {}),
            },
            data_config={
                "input_size": (in_chans, image_size, image_size),
                "mean": tuple(mean),
                "std": tuple(std),
                "interpolation": interpolation,
                "crop_pct": crop_pct,
                "crop_mode": "center",  # the crop of this project, also for published weights with another one
            },
            safe_serialization=True,
        )
        write_json(aside / CONFIG_FILE, _without_repetitions(read_config(aside / CONFIG_FILE)))
        (aside / README_FILE).write_text(readme, encoding="utf-8", errors="backslashreplace")  # a path need not be UTF-8
