"""The house: import floors, true README, checks that the tree itself must pass."""

import ast
import re
from pathlib import Path

import yaml
from conftest import ROOT

from pipeline.config import FIELDS, SECTIONS

# A module imports only from a floor below; floor 1 and 2 modules may also build on a neighbour that is listed before them.
FLOORS = [
    {"config", "console", "metrics", "muon", "randomness"},
    {"schedule", "images", "randaugment", "ema", "stems"},
    {"dataset_table", "splits", "transforms", "weights", "optimizers", "sam", "checkpoint", "tracking"},
    {"folders", "hub", "models", "loaders"},
    {"datasets"},
    {"assembly", "evaluate", "state"},
    {"run", "plan", "model_card"},
    {"ending"},
    {"training"},
]
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names}


def imports_of(path: Path) -> set[str]:
    """The modules of pipeline that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "pipeline":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("pipeline."):
            found.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("pipeline.")}
    return found


def test_a_module_imports_only_from_a_floor_below():
    modules = {path.stem: path for path in (ROOT / "pipeline").glob("*.py") if path.stem != "__init__"}
    assert modules.keys() == FLOOR.keys()
    for name, path in modules.items():
        for imported in imports_of(path):
            assert FLOOR[imported] < FLOOR[name], f"{name} imports {imported}, which is not on a floor below"


def test_readme_names_every_file_and_every_section_of_settings():
    text = (ROOT / "README.md").read_text()
    for path in [*(ROOT / "pipeline").glob("*.py"), *(ROOT / "accelerate_configs").iterdir()]:
        assert path.name in text, path.name
    for section in SECTIONS.values():
        assert section in text
    for name in FIELDS:
        assert f"`{name}`" in text, name


def test_ci_runs_the_readme_command_for_tests():
    commands = re.findall(r"^(python3 -m venv .*)$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert len(commands) == 2 and commands[0].endswith("train.py") and commands[1].endswith("pytest")
    assert commands[1] in (ROOT / ".ci" / "run").read_text().splitlines()


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
