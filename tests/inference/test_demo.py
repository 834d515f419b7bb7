"""The demo: the figures of predict, an occlusion map of what matters, a page in Chromium, and a Space that starts as written."""

import json
import re
import signal
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from conftest import ROOT, run_process

from pipeline import demo
from pipeline.data.splits import Split
from pipeline.images.preprocessing import Preprocessing
from pipeline.inference import demo_app
from pipeline.inference.demo_app import classify, explain, launch, make_app
from pipeline.inference.demo_space import IMPORTED, REQUIREMENTS, imported_files, write_examples, write_space
from pipeline.inference.prediction import predict
from pipeline.inference.saved_model import SavedModel, load_saved_model
from pipeline.settings.command_line import exit_status

# found without being imported, which takes seconds in every process that collects the tests
pytestmark = pytest.mark.skipif(None in map(find_spec, ("gradio", "captum")), reason="needs gradio and captum")


class Corner(torch.nn.Module):
    """Scores class 1 by the brightness of the upper left quarter of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.num_classes = 2

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        bright = images[:, :, : images.shape[2] // 2, : images.shape[3] // 2].mean(dim=(1, 2, 3))
        return torch.stack([torch.zeros_like(bright), bright], dim=1)


@pytest.fixture
def run_and_examples(finished_run, tmp_path) -> tuple[SavedModel, list[Path]]:
    _, run_dir = finished_run()
    saved = load_saved_model(str(run_dir))
    (tmp_path / "examples").mkdir()
    return saved, write_examples(saved, tmp_path / "examples", 4, None)


def test_the_classes_have_the_probabilities_of_predict(run_and_examples):
    saved, examples = run_and_examples
    assert len(examples) == 4 and {path.suffix for path in examples} == {".png"}
    paths = [str(path) for path in examples]
    expected = predict(saved, paths, top_k=10, batch_size=1, device=torch.device("cpu"))
    for path, prediction in zip(paths, expected):
        ours = classify(saved, path)
        assert [ours[saved.shown_names[number]] for number in prediction.classes] == list(prediction.probabilities)
    assert classify(saved, None) == {} and explain(saved, None) is None


def test_the_map_tints_the_part_that_the_model_looks_at(tmp_path):
    from PIL import Image

    path = tmp_path / "white.png"
    Image.new("RGB", (64, 64), "white").save(path)
    saved = SavedModel("corner", Corner().eval(), Preprocessing(64, 3, (0.5,) * 3, (0.5,) * 3), ["no", "yes"], {})
    tint = 255 - explain(saved, str(path)).min(axis=2).astype(int)
    assert tint.shape == (256, 256) and tint[:96, :96].min() > 50
    assert tint[176:].max() == tint[:, 176:].max() == 0


def test_a_file_that_is_no_image_is_an_error_for_the_page(run_and_examples, tmp_path):
    saved, _ = run_and_examples
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(ValueError, match="text.png: Cannot decode"):
        classify(saved, str(tmp_path / "text.png"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:gradio.queueing")  # Gradio 6 uses options that pandas 3 deprecates
def test_a_picture_goes_in_and_its_label_comes_out(run_and_examples, browser):
    from selenium.common.exceptions import WebDriverException
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    saved, examples = run_and_examples
    app = make_app(saved, examples, "digits")
    try:
        browser.get(launch(app, None, blocking=False))
        # Gradio may put a new element in the place of one that was found, or cover it for a moment
        wait = WebDriverWait(browser, 120, ignored_exceptions=[WebDriverException, IndexError])
        wait.until(lambda page: page.find_element(By.CSS_SELECTOR, "input[type=file]").send_keys(str(examples[0])) is None)
        wait.until(lambda page: shown_label(page) == best_class(saved, examples[0]))
        other = next(path for path in examples if best_class(saved, path) != best_class(saved, examples[0]))
        place = examples.index(other)
        wait.until(lambda page: page.find_elements(By.CSS_SELECTOR, ".gallery-item")[place].click() is None)
        wait.until(lambda page: shown_label(page) == best_class(saved, other))
        wait.until(lambda page: shown_size(page, "parts that matter") == 224)
    finally:
        app.close()
        browser.get("about:blank")
        browser.get_log("browser")  # Gradio's warnings, which belong to no other test


def best_class(saved: SavedModel, path: Path) -> str:
    figures = classify(saved, str(path))
    return max(figures, key=lambda name: figures[name])


def shown_label(page) -> str | None:
    return page.execute_script("return document.querySelector('[data-testid=label-output-value]')?.textContent.trim()")


def shown_size(page, label: str) -> int | None:
    """The natural width of the picture in the component with this label; None if it has none."""
    script = "return [...document.querySelectorAll('.block')].filter(block => block.textContent.includes(arguments[0]))"
    return page.execute_script(f"{script}.map(block => block.querySelector('img')?.naturalWidth).find(width => width)", label)


@pytest.mark.slow
def test_a_space_starts_as_written_without_the_project(run_and_examples, tmp_path):
    saved, examples = run_and_examples
    space = tmp_path / "space"
    write_space(saved, space, examples)
    assert {path.name for path in space.iterdir()} == {"app.py", "README.md", "requirements.txt", "pipeline", "model", "examples"}
    code = (
        "import json, app, pipeline; from pipeline.inference.demo_app import classify; "
        "figures = classify(app.saved, str(next(iter(sorted((app.FOLDER / 'examples').glob('*')))))); "
        "print(json.dumps([pipeline.__file__, figures, type(app.app).__name__]))"
    )
    done = run_process("-c", code, cwd=space, fresh=True, PYTHONPATH="")
    assert done.returncode == 0, done.stderr
    file, figures, kind = json.loads(done.stdout.splitlines()[-1])
    assert Path(file).is_relative_to(space) and kind == "Blocks"
    assert figures == classify(saved, str(examples[0]))
    front = (space / "README.md").read_text().split("---")[1]
    assert re.search(r"^sdk: gradio\nsdk_version: \d+\.\d+\.\d+\napp_file: app.py$", front, re.MULTILINE)


def test_a_space_of_a_run_with_any_name_has_a_title_that_yaml_reads_and_no_example_that_cannot_be_read(
    finished_run, tmp_path, monkeypatch
):
    _, run_dir = finished_run()
    saved = load_saved_model(str(run_dir.rename(tmp_path / 'a: "b" #ü')))
    encoded = Split.encoded
    monkeypatch.setattr(Split, "encoded", lambda split, row: b"no image" if row == 0 else encoded(split, row))
    (tmp_path / "examples").mkdir()
    examples = write_examples(saved, tmp_path / "examples", 3, None)
    assert [path.name for path in examples] == ["02.png", "03.png"]
    write_space(saved, tmp_path / "space", examples)
    front = yaml.safe_load((tmp_path / "space" / "README.md").read_text(encoding="utf-8").split("---\n")[1])
    assert front["title"] == 'a: "b" #ü' and front["app_file"] == "app.py"


def test_a_space_has_the_code_that_its_app_imports_and_requires_what_the_project_does():
    names = {str(path.relative_to(ROOT / "pipeline")) for path in imported_files()}
    assert {*IMPORTED, "__init__.py", "images/decode.py", "models/timm_folder.py", "settings/parser.py"} <= names
    assert not {name for name in names if name.split("/")[0] in ("data", "loaders", "optim", "report", "benchmark")}
    ours = {*(ROOT / "requirements.txt").read_text().split(), *(ROOT / "requirements-test.txt").read_text().split()}
    assert set(REQUIREMENTS.split()) <= ours


@pytest.mark.parametrize("place", ["full", "missing/space"])
def test_a_space_is_written_into_a_new_folder_only(tmp_path, capsys, place):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "kept.txt").write_text("kept")
    assert demo.main(["resnet18", "--space", str(tmp_path / place)]) == 2
    assert "--space" in capsys.readouterr().err and (tmp_path / "full" / "kept.txt").read_text() == "kept"


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_demo_with_its_status(number, status, monkeypatch):
    closed = []
    app = SimpleNamespace(launch=lambda **options: (None, "http://127.0.0.1", None), close=lambda verbose: closed.append(True))
    themes = SimpleNamespace(Default=lambda **fonts: None)
    monkeypatch.setattr(demo_app, "import_gradio", lambda: SimpleNamespace(themes=themes))
    monkeypatch.setattr(demo_app, "Event", lambda: SimpleNamespace(wait=lambda: signal.raise_signal(number)))
    try:
        assert exit_status(lambda: launch(app, None)) == status == 130
    except SystemExit as end:
        assert end.code == status == 143
    assert closed == [True]


def test_a_missing_package_is_reported_before_the_model_is_loaded(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "captum" else object())
    assert demo.main(["nowhere"]) == 2
    assert "The demo needs captum: pip install captum" in capsys.readouterr().err


def test_a_model_without_a_run_has_no_examples(tmp_path):
    saved = SavedModel("corner", Corner(), Preprocessing(8, 3, (0.5,) * 3, (0.5,) * 3), None, {})
    assert write_examples(saved, tmp_path, 4, None) == [] and not list(tmp_path.iterdir())
