"""The house: rooms and floors of pipeline/, and what the tree itself must satisfy."""

import ast
import re
import shlex
from collections.abc import Iterable
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, run_process

from pipeline.settings.config import FIELDS, SECTIONS
from pipeline.settings.parser import read_config

# The floor of each room. A room imports only from rooms on lower floors; inside a room files may build on one another.
FLOORS = {
    "common": 1,
    "settings": 2,
    "images": 2,
    "models": 2,
    "data": 3,
    "distributed": 3,
    "run_folder": 3,
    "loaders": 4,
    "optim": 4,
    "training": 5,
    "inference": 6,
    "sweep": 6,
    "benchmark": 6,
    "report": 7,
}
COMMANDS = {"evaluate", "predict", "export"}  # modules beside the rooms, on the highest floor


def modules() -> dict[str, Path]:
    """The modules of pipeline by their dotted names, such as pipeline.training.loop."""
    return {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in (ROOT / "pipeline").rglob("*.py")}


def imports_of(path: Path, known: Iterable[str]) -> set[str]:
    """The modules of pipeline that a file imports, anywhere in it."""
    named = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            named |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            named |= {alias.name for alias in node.names}
    return named & set(known)


def test_every_folder_of_pipeline_is_a_room_with_a_floor_and_a_sentence():
    folders = {path.name for path in (ROOT / "pipeline").iterdir() if path.is_dir() and any(path.glob("*.py"))}
    assert folders == FLOORS.keys()
    beside = {path.stem for path in (ROOT / "pipeline").glob("*.py")}
    assert beside == COMMANDS | {"__init__"}
    for room in FLOORS:
        tree = ast.parse((ROOT / "pipeline" / room / "__init__.py").read_text())
        assert ast.get_docstring(tree) and len(tree.body) == 1, f"{room}/__init__.py must be a docstring and nothing else"


@pytest.mark.parametrize("room", FLOORS)
def test_a_room_imports_only_from_rooms_on_lower_floors(room):
    known = modules()
    paths = {name: path for name, path in known.items() if name.startswith(f"pipeline.{room}.")}
    assert len(paths) > 1
    for name, path in paths.items():
        for imported in imports_of(path, known):
            other = imported.split(".")[1] if "." in imported else room
            assert other not in COMMANDS, f"{name} imports the command {imported}"
            assert other == room or FLOORS[other] < FLOORS[room], f"{name} imports {imported}, which is not on a lower floor"


def test_no_modules_import_each_other_in_a_circle():
    known = modules()
    left = {name: imports_of(path, known) - {name, "pipeline"} for name, path in known.items()}
    assert len(left) > 100
    while left:
        free = {name for name, imported in left.items() if not imported & left.keys()}
        assert free, f"these modules import each other in a circle, or one that does: {sorted(left)}"
        left = {name: imported for name, imported in left.items() if name not in free}


def test_models_are_wrapped_and_train_states_built_in_one_place():
    """Else a benchmark, or a test, takes another path under FSDP2 than a run does."""
    places: dict[str, set[str]] = {"TrainState": set(), "accelerator.prepare": set()}
    for name, path in modules().items():
        for node in ast.walk(ast.parse(path.read_text())):
            called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            if called in places:
                places[called].add(name)
    assert places == {
        "TrainState": {"pipeline.training.state"},
        "accelerator.prepare": {"pipeline.distributed.accelerator"},
    }


def test_tests_mirror_the_rooms():
    folders = {path.name for path in (ROOT / "tests").iterdir() if path.is_dir() and any(path.glob("*.py"))}
    assert folders == FLOORS.keys()


def test_readme_names_every_file_and_every_section_of_settings():
    text = (ROOT / "README.md").read_text()
    ours = [path for ending in ("py", "css", "js") for path in (ROOT / "pipeline").rglob(f"*.{ending}")]
    for path in [*ours, *(ROOT / "accelerate_configs").iterdir(), *(ROOT / "sweeps").iterdir()]:
        assert str(path.relative_to(ROOT)) in text, path
    for section in SECTIONS.values():
        assert section in text
    for name in FIELDS:
        assert f"`{name}`" in text, name


def test_ci_runs_the_readme_command_for_tests():
    commands = re.findall(r"^(python3 -m venv .*)$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert len(commands) == 2 and commands[0].endswith("train.py") and commands[1].endswith("pytest")
    assert commands[1] in (ROOT / ".ci" / "run").read_text().splitlines()


def test_every_command_of_the_readme_has_settings_that_exist():
    text = (ROOT / "README.md").read_text().replace("\\\n", " ")
    commands = [
        line.split("#")[0]
        for line in text.splitlines()
        if re.match(r"(python|ACCEL|accelerate|torchrun).*train\.py", line)
    ]
    assert len(commands) > 10
    for command in commands:
        arguments = shlex.split(command.split("train.py", 1)[1].split(">")[0])
        if "--config" in arguments and not (ROOT / arguments[arguments.index("--config") + 1]).is_file():
            place = arguments.index("--config")  # a file that only the reader has
            del arguments[place : place + 2]
        if arguments not in (["--help"], ["--print_config"]):
            read_config(arguments)


def test_the_first_command_of_the_readme_trains_and_ends_in_a_table(tmp_path):
    """Without its installation, in an empty folder, and cut short."""
    first = re.findall(r"^python3 -m venv .* (train.py)$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert first == ["train.py"]
    done = run_process(str(ROOT / "train.py"), "--epochs=1", "--max_train_samples=64", cwd=tmp_path, fresh=True)
    assert done.returncode == 0, done.stderr
    assert "test accuracy" in done.stdout and "resnet18_small_stem" in done.stdout
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert (run_dir / "model" / "model.safetensors").is_file()


def test_every_launch_file_opens_with_its_command():
    files = sorted((ROOT / "accelerate_configs").glob("*.yaml"))
    assert len(files) >= 4
    for path in files:
        first = path.read_text().splitlines()[0]
        assert first.startswith("# ") and f"accelerate_configs/{path.name}" in first and "train.py" in first
        assert yaml.safe_load(path.read_text())["compute_environment"] == "LOCAL_MACHINE"


def test_every_dependency_is_explained():
    text = (ROOT / "README.md").read_text()
    names = [
        re.split(r"[><=]", line)[0] for line in (ROOT / "requirements.txt").read_text().splitlines() if line[0] != "#"
    ]
    assert len(names) > 5
    for name in names:
        assert re.search(rf"^\| {re.escape(name)} \|", text, re.MULTILINE), name
