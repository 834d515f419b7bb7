"""Loads a saved model with its preprocessing and label names, from a run, a timm folder, the Hub or timm."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

from timm.data import ImageNetInfo, infer_imagenet_subset
from torch import nn

from pipeline.common import console
from pipeline.common.suggestions import did_you_mean
from pipeline.images.decode import GREY_MAX
from pipeline.images.preprocessing import Preprocessing
from pipeline.models.create import input_settings, load_published
from pipeline.models.timm_folder import CONFIG_FILE, PER_CLASS, load_model, read_config
from pipeline.settings.config import Config
from pipeline.settings.parser import from_yaml

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(@[\w.-]+)?", re.ASCII)


@dataclasses.dataclass(frozen=True)
class SavedModel:
    """A trained model with its metadata.

    source: as the user gave it; model: in evaluation mode, on the CPU; label_names: one per class, None if unknown;
    descriptions: readable names of label names that are codes, such as ImageNet's; folder: the timm folder, None for a
    published model; config and run_dir: those of a run, None for any other model. loss: a row of losses.LOSSES; of a model
    without a run, one that gives the same probabilities.
    """

    source: str
    model: nn.Module
    preprocessing: Preprocessing
    label_names: list[str] | None
    descriptions: dict[str, str]
    folder: Path | None = None
    config: Config | None = None
    run_dir: Path | None = None
    loss: str = "cross_entropy"

    @property
    def num_classes(self) -> int:
        return int(vars(self.model)["num_classes"])

    @property
    def shown_names(self) -> list[str]:
        """The name to print for each class: its description, else its label name, else its number."""
        names = self.label_names or [str(number) for number in range(self.num_classes)]
        return [self.descriptions.get(name, name) for name in names]


def load_saved_model(source: str) -> SavedModel:
    """The model of a run's folder, a timm folder (`local-dir:PATH` too), a Hub id (`hf-hub:` or not) or a timm name.

    Raises ValueError if the source is none of these, cannot be downloaded or is damaged.
    """
    path = Path(source.removeprefix("local-dir:")).expanduser()
    if path.is_dir():
        run_dir = path if (path / "config.yaml").is_file() else None
        folder = model_folder(path)
        model = load_model(folder)
        parts = describe(source, model, read_config(folder / CONFIG_FILE))
        config = from_yaml(path / "config.yaml") if run_dir else None
        loss = parts.loss if config is None else config.loss
        return dataclasses.replace(parts, folder=folder, config=config, run_dir=run_dir, loss=loss)
    check_is_no_path(source)
    is_hub_id = ":" not in source and HUB_ID.fullmatch(source) is not None
    name = f"hf-hub:{source}" if is_hub_id else source
    try:
        model = load_published(name)
    except ValueError as error:
        hint = f" (There is no folder {source!r} either.)" if is_hub_id else ""
        raise ValueError(f"{error}{hint}") from error
    return describe(source, model, published_config(name))


def check_is_no_path(source: str) -> None:
    """Raises ValueError, with similar names of that folder, for a source that looks like a path that does not exist."""
    path = Path(source.removeprefix("local-dir:")).expanduser()
    beside_folders = "/" in source and path.parent.is_dir()
    if source.startswith((".", "/", "~", "local-dir:")) or source.endswith("/") or beside_folders or path.exists():
        close = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        raise ValueError(
            f"No folder {source!r}.{did_you_mean(path.name, close)} "
            "Pass a run (runs/NAME), a timm folder, a Hub id (owner/name) or a timm model name."
        )


def model_folder(path: Path) -> Path:
    """The timm folder of a run, or `path` if it is a timm folder. Raises ValueError if it is neither."""
    for folder in (path / "model", path):
        if (folder / CONFIG_FILE).is_file():
            return folder
    if (path / "config.yaml").is_file():
        raise ValueError(
            f"{path} is a run without a model: it has not ended. Resume it: python train.py --config {path / 'config.yaml'}"
        )
    raise ValueError(f"{path} is neither a run (with model/{CONFIG_FILE}) nor a timm folder (with {CONFIG_FILE}).")


def published_config(name: str) -> dict[str, Any]:
    """The config.json of a Hub model, from the cache that loading it has filled; empty for a timm name."""
    if not name.startswith("hf-hub:"):
        return {}
    from huggingface_hub import hf_hub_download

    repo, _, revision = name.removeprefix("hf-hub:").partition("@")
    file = hf_hub_download(repo, CONFIG_FILE, revision=revision or None)
    return dict(json.loads(Path(file).read_text(encoding="utf-8")))


def describe(source: str, model: nn.Module, config_json: dict[str, Any]) -> SavedModel:
    """The model with its preprocessing and names. Raises ValueError for unsupported preprocessing or wrong names."""
    settings = input_settings(model)
    channels, height, width = settings.input_size
    if height != width:
        raise ValueError(f"{source!r} takes images of {height} x {width} pixels; only square input is supported.")
    crop_mode = vars(model)["pretrained_cfg"].get("crop_mode") or "center"
    if crop_mode != "center":
        console.warn(f"{source} uses timm's crop_mode {crop_mode}, which is not supported; images are center-cropped instead.")
    preprocessing = Preprocessing(
        image_size=height,
        channels=channels,
        mean=settings.mean,
        std=settings.std,
        interpolation=settings.interpolation,
        crop_pct=settings.crop_pct,
        source_size=config_json.get("source_size"),
        grey_max=config_json.get("grey_max") or GREY_MAX,
    )
    loss = "bce" if config_json.get("problem_type") == PER_CLASS else "cross_entropy"
    return SavedModel(source, model.eval(), preprocessing, *names_of(source, model), loss=loss)


def names_of(source: str, model: nn.Module) -> tuple[list[str] | None, dict[str, str]]:
    """The label names by class and the descriptions by label name; timm provides both for ImageNet models.

    Raises ValueError for another number of label names than of classes.
    """
    pretrained_cfg, num_classes = vars(model)["pretrained_cfg"], vars(model)["num_classes"]
    names, descriptions = pretrained_cfg.get("label_names"), pretrained_cfg.get("label_descriptions")
    if isinstance(names, dict):  # by class number; some may be missing
        names = [names.get(str(number), str(number)) for number in range(num_classes)]
    if names and len(names) != num_classes:
        raise ValueError(
            f"{source!r} has {len(names)} label names for {num_classes} classes; its config.json is wrong."
        )
    subset = infer_imagenet_subset(model) if not names else None
    if subset is not None:
        info = ImageNetInfo(subset)
        names, descriptions = info.label_names(), info.label_descriptions(as_dict=True)
    return [str(name) for name in names] if names else None, dict(descriptions or {})
