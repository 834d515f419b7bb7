"""The page of `python -m pipeline.demo`: a Gradio interface that classifies a picture and shows which parts of it matter."""

import os
from importlib import import_module
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.images.preprocessing import Preprocessing
from pipeline.inference.prediction import probabilities_of, read_file, to_input
from pipeline.inference.saved_model import SavedModel

TOP_K = 5
WINDOWS = 7  # covered windows side by side; each reaches half-way into the next
PASSES_AT_ONCE = 16  # covered images in one forward pass
TINT, STRONGEST = np.array([230.0, 60.0, 20.0]), 0.7  # colour of the parts that matter, and its share where they matter most
SMALLEST_SIDE = 224  # of the map in pixels
HEIGHT = 360  # of the dropped picture in pixels


def check_packages() -> None:
    """Raises ValueError if Gradio or captum is not installed."""
    from importlib.util import find_spec

    missing = [name for name in ("gradio", "captum") if find_spec(name) is None]
    if missing:
        raise ValueError(f"The demo needs {' and '.join(missing)}: pip install {' '.join(missing)}")


def classify(saved: SavedModel, path: str | None) -> dict[str, float]:
    """The probability of each class for the image of a file, by its shown name; empty without a file. Raises ValueError."""
    if path is None:
        return {}
    probabilities = probabilities_of(saved.model, model_input(saved, path), saved.loss)[0].tolist()
    return dict(zip(saved.shown_names, probabilities))


def model_input(saved: SavedModel, path: str) -> Tensor:
    """The image as the model receives it in evaluation; float [1, C, S, S]. Raises ValueError if it cannot be read."""
    image = read_file(path, saved.preprocessing)
    if isinstance(image, str):
        raise ValueError(image)
    return to_input([image], saved.preprocessing, torch.device("cpu"))


def explain(saved: SavedModel, path: str | None) -> np.ndarray | None:
    """The image as the model receives it, the parts whose covering lowers the score of the top class tinted; uint8 [H, W, 3].

    Occlusion, https://arxiv.org/abs/1311.2901, by captum: a window of the mean colour is moved over the image.
    """
    if path is None:
        return None
    from captum.attr import Occlusion

    images = model_input(saved, path)
    window = max(-(-2 * images.shape[-1] // (WINDOWS + 1)), 1)
    with torch.inference_mode():
        top = saved.model(images).argmax(dim=1)
        effect = Occlusion(saved.model).attribute(
            images,
            sliding_window_shapes=(images.shape[1], window, window),
            strides=(images.shape[1], max(window // 2, 1), max(window // 2, 1)),
            target=top,
            perturbations_per_eval=PASSES_AT_ONCE,
        )
    return tinted(images[0], effect[0].mean(dim=0), saved.preprocessing)


def tinted(image: Tensor, effect: Tensor, preprocessing: Preprocessing) -> np.ndarray:
    """The image with a tint in proportion to the positive effect. image: model input [C, S, S]; effect: float [S, S]."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (preprocessing.mean, preprocessing.std))
    pixels = (image * std + mean).clamp(0, 1).expand(3, -1, -1).permute(1, 2, 0).numpy() * 255
    positive = effect.clamp(min=0)
    share = (positive / positive.max().clamp(min=1e-12)).numpy()[:, :, None] * STRONGEST
    mixed = (pixels * (1 - share) + TINT * share).round().astype(np.uint8)
    factor = -(-SMALLEST_SIDE // mixed.shape[0])
    return mixed.repeat(factor, axis=0).repeat(factor, axis=1)


def import_gradio() -> Any:
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read when gradio is imported
    return import_module("gradio")


def make_app(saved: SavedModel, examples: list[Path], title: str) -> Any:
    """The Gradio app (gradio.Blocks) of a model on the CPU. examples: image files to click on."""
    gradio = import_gradio()

    def guarded(action: Any) -> Any:
        """The function of a path, whose ValueError becomes a message on the page."""

        def call(path: str | None) -> Any:
            try:
                return action(saved, path)
            except ValueError as error:
                raise gradio.Error(str(error), print_exception=False) from error

        return call

    heading = f"# {title}: {saved.num_classes} classes"
    with gradio.Blocks(title=title, analytics_enabled=False) as app:
        gradio.Markdown(f"{heading}\nDrop a picture. The map tints the parts whose covering lowers the score of the top class.")
        with gradio.Row():
            own = {"label": "picture", "sources": ["upload", "clipboard"], "height": HEIGHT}
            picture = gradio.Image(type="filepath", image_mode=None, **own)  # the file as it is, as predict reads it
            with gradio.Column():
                label = gradio.Label(num_top_classes=min(TOP_K, saved.num_classes), label="classes")
                heat = gradio.Image(label="parts that matter", interactive=False, format="png")
        changed = picture.change(guarded(classify), picture, label, api_name="classify")
        changed.then(guarded(explain), picture, heat, api_name="explain")
        if examples:
            gradio.Examples([[str(path)] for path in examples], picture, label="test images")
    return app


def launch(app: Any, port: int | None, blocking: bool = True) -> str:
    """Serves the app on 127.0.0.1 and returns its address; with `blocking`, serves it until a signal raises an exception.

    Raises ValueError if the port is in use.
    """
    gradio = import_gradio()
    fonts: dict[str, Any] = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}  # no web fonts
    try:
        _, address, _ = app.launch(
            server_name="127.0.0.1",
            server_port=port,
            prevent_thread_lock=True,  # Gradio would wait here, and treat Ctrl-C as a success
            share=False,
            ssr_mode=False,
            theme=gradio.themes.Default(**fonts),
        )
    except OSError as error:
        raise ValueError(f"The demo cannot be served: {error}") from error
    if blocking:
        try:
            Event().wait()
        finally:
            app.close(verbose=False)
    return str(address)
