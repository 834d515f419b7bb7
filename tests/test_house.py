"""The house: import floors, true README, checks that the tree itself must pass."""

import ast
import re
import shlex
from pathlib import Path

import yaml
from conftest import ROOT, run_process

from pipeline.settings.config import FIELDS, SECTIONS
from pipeline.settings.parser import read_config

# A module imports only from a floor below; floor 1 and 2 modules may also build on a neighbour that is listed before them.
FLOORS = [
    {
        "batchnorm",
        "config",
        "console",
        "cores",
        "failures",
        "files",
        "importance",
        "metrics",
        "muon",
        "randomness",
        "sharding",
        "signals",
    },
    {
        "linefile",
        "lock",
        "peers",
        "schedule",
        "parsing",
        "images",
        "randaugment",
        "ema",
        "stems",
        "cache",
        "lanes",
        "small_models",
        "preprocessing",
    },
    {"dataset_table", "splits", "fitting", "weights", "optimizers", "sam", "checkpoint", "tracking", "command_line"},
    {"known_sets", "transforms"},
    {
        "folders",
        "hub",
        "models",
        "mixing",
        "placement",
        "decoded",
        "screening",
        "shards",
        "resume",
        "saving",
        "publishing",
        "run_records",
    },
    {"loaders", "shard_index", "memory", "figures", "sweep_records"},
    {"datasets", "machine", "stream", "saved_model"},
    {"assembly", "comparison", "evaluation", "state", "prediction"},
    {"run", "plan", "model_card", "saved_evaluation", "exporting", "mistakes", "comparison_figures", "report_tables"},
    {"ending", "report_page"},
    {"training", "report_content"},
    {"evaluate", "predict", "export", "report", "sweep_space"},
    {"sweep_file"},
    {"sweep_stopping", "sweep_trials"},
    {"sweep_study"},
    {"sweep_table"},
    {"sweep"},
    {"benchmark.measuring", "benchmark.stepclock", "benchmark.sets", "benchmark.peer_loaders", "benchmark.child"},
    {"benchmark.children", "benchmark.reporting", "benchmark.ours", "benchmark.peers", "benchmark.bare_script"},
    {"benchmark.contenders"},
    {
        *("benchmark.loop", "benchmark.loaders", "benchmark.optimizers", "benchmark.checkpoint"),
        *("benchmark.startup", "benchmark.scaling", "benchmark.efficiency", "benchmark.lr"),
    },
    {"benchmark.__main__"},
]
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names}


def modules_of_pipeline() -> dict[str, Path]:
    """The files by their names below pipeline: training, benchmark.loop."""
    root = ROOT / "pipeline"
    paths = [path for path in root.rglob("*.py") if path.stem != "__init__"]
    return {".".join(path.relative_to(root).with_suffix("").parts): path for path in paths}


def imports_of(path: Path) -> set[str]:
    """The modules of pipeline that a file imports, anywhere in it, by their names below pipeline."""
    named = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            named |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module or ""}
        elif isinstance(node, ast.Import):
            named |= {alias.name for alias in node.names}
    below = {name.removeprefix("pipeline.") for name in named if name.startswith("pipeline.")}
    return {name for name in below if name in FLOOR}


def test_a_module_imports_only_from_a_floor_below():
    modules = modules_of_pipeline()
    assert modules.keys() == FLOOR.keys()
    for name, path in modules.items():
        for imported in imports_of(path):
            assert FLOOR[imported] < FLOOR[name], f"{name} imports {imported}, which is not on a floor below"


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
    done = run_process(str(ROOT / "train.py"), "--epochs=1", "--max_train_samples=64", cwd=tmp_path)
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
