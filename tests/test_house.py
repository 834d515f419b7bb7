"""The house: rooms and floors of pipeline/, and what the tree itself must satisfy."""

import ast
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterable
from pathlib import Path

import pytest
from conftest import ROOT

# The floor of each room. A room imports only from rooms on lower floors; inside a room files may build on one another.
FLOORS = {
    "common": 1,
    "settings": 2,
    "images": 2,
    "models": 2,
    "pages": 2,
    "data": 3,
    "distributed": 3,
    "run_folder": 3,
    "loaders": 4,
    "optim": 4,
    "training": 5,
    "inference": 6,
    "sweep": 6,
    "benchmark": 7,
    "inspect": 7,
    "report": 7,
}
COMMANDS = {"evaluate", "predict", "export", "demo"}  # modules beside the rooms, on the highest floor


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


def test_help_of_every_command_imports_nothing_heavy():
    rooms = ["sweep.__main__", "inspect.__main__", "report.__main__", "benchmark.__main__"]
    commands = [f"pipeline.{name}" for name in (*sorted(COMMANDS), *rooms)]
    heavy = "torch torchvision timm accelerate datasets pandas wandb tensorboard matplotlib optuna jinja2"
    program = (
        "import importlib, sys\n"
        "for name in sys.argv[1:]:\n"
        "    try:\n        importlib.import_module(name).main(['--help'])\n"
        "    except SystemExit as exit:\n        assert exit.code == 0\n"
        "    else:\n        raise AssertionError('did not exit')\n"
        f"    print(name, 'imported:', *sorted(set('{heavy}'.split()) & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", program, *commands], check=True, capture_output=True, text=True, cwd=ROOT)
    assert [line for line in done.stdout.splitlines() if "imported:" in line] == [f"{name} imported:" for name in commands]
    for name in commands:
        assert f"usage: python -m {name.removesuffix('.__main__')} " in done.stdout


def test_a_wheel_has_every_file_of_the_package_and_every_requirement(tmp_path):
    """Built from a copy, offline."""
    source, wheels = tmp_path / "source", tmp_path / "wheels"
    shutil.copytree(ROOT / "pipeline", source / "pipeline", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("train.py", "setup.cfg", "pyproject.toml", "README.md", "LICENSE", "requirements.txt", "requirements-test.txt"):
        shutil.copy(ROOT / name, source / name)
    files = {str(path.relative_to(source)) for path in (source / "pipeline").rglob("*") if path.is_file()}
    offline = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "wheel", *offline, "--wheel-dir", str(wheels), str(source)]
    subprocess.run(command, check=True, timeout=300)
    (wheel,) = wheels.iterdir()
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
        metadata = next(archive.read(name).decode() for name in archive.namelist() if name.endswith("/METADATA"))
    assert packed == files | {"train.py"}
    required = {line for line in (ROOT / "requirements.txt").read_text().splitlines() if not line.startswith("#")}
    assert set(re.findall(r"^Requires-Dist: ([^;\n]*)$", metadata, re.MULTILINE)) == required
    assert metadata.endswith((ROOT / "README.md").read_text())
