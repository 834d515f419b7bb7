"""Writes a demo as a Hugging Face Space: app.py, requirements.txt, the model, examples and the code that it needs."""

import ast
import contextlib
import dataclasses
import json
import shutil
from importlib.metadata import version
from pathlib import Path

from pipeline.common import console
from pipeline.common.files import folder_written_aside
from pipeline.data.from_settings import load_data
from pipeline.distributed.accelerator import make_accelerator
from pipeline.images.decode import BadImage, file_kind
from pipeline.inference.saved_model import SavedModel

PACKAGE = Path(__file__).parents[1]
# the app imports the first; pipeline/__init__.py imports the others by their names when timm is imported
IMPORTED = ("inference/demo_app.py", "models/small_models.py", "models/small_stems.py")
# what these import; the bounds are those of the project's requirements.txt and requirements-test.txt
REQUIREMENTS = """torch>=2.9
timm>=1.0.31
safetensors>=0.6
huggingface_hub>=0.34
jsonargparse>=4.41
PyYAML>=6.0
Pillow>=11.3
numpy>=2.0
tqdm>=4.67
psutil>=6.0
gradio>=6.0
captum>=0.8
"""

APP = '''"""Classifies the picture you drop: python app.py. Written by `python -m pipeline.demo`."""

from pathlib import Path

from pipeline.inference.demo_app import make_app
from pipeline.inference.saved_model import load_saved_model

FOLDER = Path(__file__).parent
MODEL = {model}  # a folder beside this file, or the name of a published model

saved = load_saved_model(str(FOLDER / MODEL) if (FOLDER / MODEL).is_dir() else MODEL)
app = make_app(saved, sorted((FOLDER / "examples").glob("*")), {title})

if __name__ == "__main__":
    app.launch()
'''

README = """---
title: {title}
sdk: gradio
sdk_version: {gradio}
app_file: app.py
---

Classifies the picture you drop and shows which parts of it matter.
"""


def check_new(folder: Path) -> None:
    """Raises ValueError if the folder exists and is not empty, or cannot be created."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"--space {folder} exists and is not empty. Choose a new folder.")
    if not folder.resolve().parent.is_dir():
        raise ValueError(f"There is no folder {folder.parent} for --space {folder}. Create it first.")


def title_of(saved: SavedModel) -> str:
    """The name of the run, or of the model as it was passed."""
    return console.on_one_line(saved.run_dir.name if saved.run_dir is not None else Path(saved.source).name)


def write_examples(saved: SavedModel, folder: Path, how_many: int, moved_to: str | None) -> list[Path]:
    """Writes test images of the run, evenly spaced, as files of their own format, without those that cannot be read.

    Warns if the dataset cannot be loaded.
    """
    if saved.config is None or not how_many:
        return []
    config = dataclasses.replace(
        saved.config, dataset=moved_to or saved.config.dataset, mixed_precision="no", loader="auto"
    )
    try:
        dataset = load_data(config, make_accelerator(config, "cpu"))
    except ValueError as error:
        console.warn(f"The demo has no examples: {error}")
        return []
    paths = []
    for number, row in enumerate(dataset.test.some_rows(how_many).tolist(), 1):
        with contextlib.suppress(BadImage):
            encoded = dataset.test.encoded(row)
            path = folder / f"{number:02d}.{file_kind(encoded).lower()}"
            path.write_bytes(encoded)
            paths.append(path)
    return paths


def imported_files() -> set[Path]:
    """The files of the package that the app imports, directly or not, with the __init__.py of their folders."""
    found: set[Path] = set()
    left = [PACKAGE / name for name in IMPORTED]
    while left:
        path = left.pop()
        if path in found:
            continue
        found |= {path, path.parent / "__init__.py", PACKAGE / "__init__.py"}
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("pipeline."):
                folder = PACKAGE.parent.joinpath(*str(node.module).split("."))
                named = [folder.with_suffix(".py"), *(folder / f"{alias.name}.py" for alias in node.names)]
                left += [each for each in named if each.is_file()]
    return found


def write_space(saved: SavedModel, folder: Path, examples: list[Path]) -> None:
    """Writes the Space. Raises OSError and leaves no partial folder."""
    title = title_of(saved)
    with folder_written_aside(folder) as aside:
        for path in imported_files():
            copy = aside / "pipeline" / path.relative_to(PACKAGE)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
        if saved.folder is not None:
            shutil.copytree(saved.folder, aside / "model")
        (aside / "examples").mkdir()
        for path in examples:
            shutil.copy(path, aside / "examples")
        model = "model" if saved.folder is not None else saved.source
        (aside / "app.py").write_text(APP.format(model=repr(model), title=repr(title)), encoding="utf-8")
        (aside / "requirements.txt").write_text(REQUIREMENTS)
        quoted = json.dumps(title, ensure_ascii=False)  # a JSON string is one of YAML
        (aside / "README.md").write_text(README.format(title=quoted, gradio=version("gradio")), encoding="utf-8")
