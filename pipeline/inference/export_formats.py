"""Exports a saved model to other formats and compares the logits of the export with the model's on real images."""

import dataclasses
import importlib.util
import shutil
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.common.files import folder_written_aside, write_json
from pipeline.data.fingerprint import fingerprint
from pipeline.data.from_settings import load_data
from pipeline.distributed.accelerator import make_accelerator
from pipeline.images.decode import BadImage
from pipeline.inference.prediction import find_images, read_file, read_image, to_input
from pipeline.inference.saved_model import SavedModel
from pipeline.models.timm_folder import CONFIG_FILE, README_FILE, WEIGHTS_FILE, load_model
from pipeline.run_folder.dataset_record import check_own_dataset
from pipeline.settings.command_line import CommandFailed
from pipeline.settings.config import Config

PREPROCESSING_FILE = "preprocessing.json"
NUM_CHECK_IMAGES = 32
LARGEST_ONNX_FILE = 2**31 - 2**20  # protobuf's limit; the weights of a larger model are written to a separate file

ELSE = "Choose another --format, or install newer versions of torch and onnxscript."

Item = TypeVar("Item")
Logits = Callable[[Tensor], Tensor]


def write_timm(saved: SavedModel, images: Tensor, folder: Path) -> None:
    """Writes copies of config.json, model.safetensors and the model card."""
    assert saved.folder is not None, "check_exportable refuses a model without a folder"
    for name in (CONFIG_FILE, WEIGHTS_FILE, README_FILE):
        if (saved.folder / name).is_file():
            shutil.copyfile(saved.folder / name, folder / name)


def read_timm(folder: Path) -> Logits:
    return load_model(folder).eval()


def write_onnx(saved: SavedModel, images: Tensor, folder: Path) -> None:
    """Writes model.onnx with input `images` [B, C, S, S], output `logits` [B, num_classes] and a dynamic batch size B."""
    num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in saved.model.state_dict().values())
    torch.onnx.export(
        saved.model,
        (images,),
        folder / "model.onnx",
        dynamo=True,
        dynamic_shapes=({0: torch.export.Dim.DYNAMIC},),
        input_names=["images"],
        output_names=["logits"],
        external_data=num_bytes > LARGEST_ONNX_FILE,
        verbose=False,
    )


def read_onnx(folder: Path) -> Logits:
    import onnxruntime

    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


def write_torchscript(saved: SavedModel, images: Tensor, folder: Path) -> None:
    """Writes model.pt by tracing; torch.jit.load reads it, in Python and C++."""
    torch.jit.trace(saved.model, (images,), check_trace=False).save(folder / "model.pt")


def read_torchscript(folder: Path) -> Logits:
    return torch.jit.load(folder / "model.pt")


def write_torch_export(saved: SavedModel, images: Tensor, folder: Path) -> None:
    """Writes model.pt2 with a dynamic batch size; torch.export.load reads it."""
    program = torch.export.export(saved.model, (images,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    torch.export.save(program, folder / "model.pt2")


def read_torch_export(folder: Path) -> Logits:
    return torch.export.load(folder / "model.pt2").module()


@dataclasses.dataclass(frozen=True)
class Format:
    """How to write and read a format, the packages it needs, and the tolerance of its logits.

    tolerance: the largest allowed value of relative_difference.
    """

    write: Callable[[SavedModel, Tensor, Path], None]
    read: Callable[[Path], Logits]
    tolerance: float
    packages: tuple[str, ...] = ()


FORMATS = {
    "timm": Format(write_timm, read_timm, 0.0),
    "onnx": Format(write_onnx, read_onnx, 1e-4, ("onnx", "onnxruntime", "onnxscript")),
    "torchscript": Format(write_torchscript, read_torchscript, 1e-5),
    "torch_export": Format(write_torch_export, read_torch_export, 1e-5),
}


def check_exportable(saved: SavedModel, name: str) -> None:
    """Raises ValueError for the timm format of a published model, which has no folder to copy."""
    if name == "timm" and saved.folder is None:
        raise ValueError(f"{saved.source} is a published model, which timm provides. Choose another --format, or a run.")


def check_packages(name: str) -> None:
    """Raises ValueError if a package that the format needs is not installed."""
    missing = [package for package in FORMATS[name].packages if importlib.util.find_spec(package) is None]
    if missing:
        needed = " ".join(FORMATS[name].packages)
        raise ValueError(f"--format {name} needs {' and '.join(missing)}: pip install {needed}")


def check_replaceable(output: Path) -> None:
    """Raises ValueError unless the folder does not exist, is empty or is an earlier export."""
    if output.exists() and not (output / PREPROCESSING_FILE).is_file() and not is_empty_folder(output):
        raise ValueError(f"{output} exists and is not an earlier export. Choose another --output.")


def is_empty_folder(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


def images_for_check(saved: SavedModel, name: str, places: Sequence[str], moved_to: str | None = None) -> Tensor:
    """Model input of at most 32 images [B, C, S, S]: of `places` if given, else evenly spaced in the run's test split.

    The timm format copies the weights: without places and moved_to its images are random, and no dataset is needed. moved_to: the
    folder of the run's dataset, if it has moved. Raises ValueError if there is no image, or one cannot be read.
    """
    if places:
        paths, problems, _ = find_images(places)
        read = [read_file(path, saved.preprocessing) for path in spread(paths)]
        problems += [image for image in read if isinstance(image, str)]
        if problems or not read:
            raise ValueError(f"--images: {problems[0] if problems else 'no image was found.'}")
        images = [image for image in read if isinstance(image, Tensor)]
    elif name == "timm" and moved_to is None:
        size, generator = saved.preprocessing.image_size, torch.Generator().manual_seed(0)
        return torch.randn(NUM_CHECK_IMAGES, saved.preprocessing.channels, size, size, generator=generator)
    elif saved.config is not None:
        images = some_test_images(saved, saved.config, moved_to)
    else:
        raise ValueError(
            f"{saved.source} is not a run and has no test images for the check. Pass some with --images."
        )
    return to_input(images, saved.preprocessing, torch.device("cpu"))


def some_test_images(saved: SavedModel, config: Config, moved_to: str | None) -> list[Tensor]:
    """At most 32 images of the run's test split, uint8 [C, S, S]. Raises ValueError if they cannot be read."""
    config = dataclasses.replace(config, dataset=moved_to or config.dataset, mixed_precision="no", loader="auto")
    try:
        dataset = load_data(config, make_accelerator(config, "cpu"))
    except ValueError as error:
        raise ValueError(f"{error} Or pass images for the check with --images.") from error
    if saved.run_dir is not None:
        check_own_dataset(saved.run_dir, {"given": config.dataset, **fingerprint(dataset)})
    test = dataset.test
    try:
        return [read_image(test.encoded(row), saved.preprocessing) for row in spread(range(len(test)))]
    except BadImage as error:
        raise ValueError(f"A test image cannot be read: {error} Pass other images with --images.") from error


def spread(items: Sequence[Item]) -> list[Item]:
    """At most 32 of the items, evenly spaced from the first to the last."""
    rows = np.linspace(0, len(items) - 1, min(len(items), NUM_CHECK_IMAGES)).round().astype(int)
    return [items[row] for row in rows]


def export(saved: SavedModel, name: str, images: Tensor, output: Path) -> dict[str, Any]:
    """Writes the folder and returns the content of its preprocessing.json, which includes the result of the check.

    images: model input [B, C, S, S] to check on. The folder is written aside, checked, and renamed; an earlier export
    is replaced. Raises CommandFailed if the conversion fails or the logits differ; then nothing is written.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    with folder_written_aside(output) as aside:
        difference = convert(saved, name, images, aside)
        facts = describe(saved, name) | {
            "check": {
                "num_images": len(images),
                "largest_relative_difference": difference,
                "tolerance": FORMATS[name].tolerance,
            }
        }
        write_json(aside / PREPROCESSING_FILE, facts)
    return facts


def convert(saved: SavedModel, name: str, images: Tensor, folder: Path) -> float:
    """Writes the format's files and returns the largest relative difference of their logits from the model's.

    images: model input [B, C, S, S]. Raises CommandFailed if the model cannot be converted or the difference is too large.
    """
    kind = FORMATS[name]
    example = images[:2] if len(images) > 1 else torch.cat([images, images])  # torch.export treats a batch size of 1 as fixed
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's warnings about tracing; the check below decides
            kind.write(saved, example, folder)
            exported = kind.read(folder)
            difference = max(relative_difference(saved.model, exported, batch) for batch in (images, images[:1]))
    except Exception as error:  # the converters raise exceptions of any type
        cause = str(error).strip().splitlines() or [""]
        raise CommandFailed(
            f"{saved.source} cannot be exported to {name} ({type(error).__name__}: {cause[0]}). Nothing was written. {ELSE}"
        ) from error
    if not difference <= kind.tolerance:  # also true for NaN
        raise CommandFailed(
            f"{name}: the exported model's logits differ from the model's by {difference:.3g}, above the tolerance of "
            f"{kind.tolerance:g}, on {len(images)} images. Nothing was written. {ELSE}"
        )
    return difference


def relative_difference(model: nn.Module, exported: Logits, images: Tensor) -> float:
    """The largest difference between two logits, over the larger of 1 and the largest absolute logit."""
    ours, theirs = model(images), exported(images)
    return float((ours - theirs).abs().max() / ours.abs().max().clamp(min=1))


def describe(saved: SavedModel, name: str) -> dict[str, Any]:
    """The content of preprocessing.json: how to prepare an image and what the outputs mean."""
    shape = saved.preprocessing
    return {
        "format": name,
        "input": "images, float32 [batch, channels, height, width]: (pixel / 255 - mean) / std",
        "output": "logits, float32 [batch, classes]",
        "input_size": [shape.channels, shape.image_size, shape.image_size],
        "mean": list(shape.mean),
        "std": list(shape.std),
        "interpolation": shape.interpolation,
        "crop_pct": shape.crop_pct,
        "source_size": shape.source_size,
        "grey_max": shape.grey_max,
        "labels": saved.shown_names,
    }
