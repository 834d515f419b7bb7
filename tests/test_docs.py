"""README, CONTRIBUTING and docs/: their commands are accepted, their links resolve, their lists and tables are complete."""

import functools
import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, run_process
from test_house import COMMANDS, FLOORS

from pipeline.data import known_datasets
from pipeline.data.known_datasets import DATASETS
from pipeline.optim.schedule import SCHEDULES, check_scheduler_name
from pipeline.settings.command_line import CommandParser
from pipeline.settings.config import Config
from pipeline.settings.parser import read_config

DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS]
RECIPES = sorted((ROOT / "pipeline" / "recipes").glob("*.yaml"))
SWEEPS = sorted((ROOT / "sweeps").glob("*.yaml"))
LAUNCH_FILES = sorted((ROOT / "accelerate_configs").iterdir())
PYTHONS = ("python", "python3", ".venv/bin/python")
# Programs and modules that are not ours: their arguments are not checked. Anything else in a command fails the test.
OTHER_PROGRAMS = (".ci/run", ".venv/bin/pip", "find", "optuna-dashboard", "wandb")
OTHER_MODULES = ("venv", "pytest", "flake8", "isort", "mypy")
OF_THE_READER = {"RANK": "0", "N": "1"}  # what stands for a number that only the reader knows


def page_id(path: Path) -> str:
    return str(path.relative_to(ROOT))


def command_lines(text: str) -> list[str]:
    """The lines of the ```sh blocks, continued lines joined, and the commands with arguments in `code` of the text."""
    blocks = re.findall(r"^ *```sh\n(.*?)^ *```$", text, re.MULTILINE | re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    prose = re.sub(r"^ *```.*?^ *```$", "", text, flags=re.MULTILINE | re.DOTALL)
    inline = re.findall(r"`((?:python train.py|python -m [\w.]+|torchrun|accelerate launch) [^`]+)`", prose)
    return [line for line in lines if line.split("#")[0].strip()] + inline


def simple_commands(line: str) -> Iterator[list[str]]:
    """The words of each command of a line such as `A=1 first | second > file && third  # comment`, without the file."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    words: list[str] = []
    tokens = iter(lexer)
    for token in tokens:
        if token in ("|", "&&", ";"):
            yield words
            words = []
        elif token == ">":
            next(tokens)
        else:
            words.append(OF_THE_READER.get(token, token))
    yield words


@functools.cache
def programs_of(line: str) -> list[str]:
    """The programs of the commands of a line, which their parsers accept. Raises, or exits, for what is refused."""
    return [check_command(words) for words in simple_commands(line)]


def check_command(words: list[str]) -> str:
    """Parses a command with the parser of its program and returns which it was. Raises, or exits, for what is refused."""
    while words and re.fullmatch(r"[A-Z_0-9]+=.*", words[0]):
        words = words[1:]
    program, *arguments = words
    if program in PYTHONS:
        if arguments[0] == "-m":
            return check_module(arguments[1], arguments[2:])
        return check_script(arguments[0], arguments[1:])
    if program == "torchrun" or words[:2] == ["accelerate", "launch"]:
        return check_launch(program, arguments if program == "torchrun" else arguments[1:])
    if program == "sbatch":
        assert (ROOT / arguments[0]).is_file(), arguments[0]
        return check_script("train.py", arguments[1:])
    assert program in OTHER_PROGRAMS, f"{program} is not a program that the documentation may use"
    if words[:2] == ["wandb", "sweep"]:
        assert (ROOT / words[2]).is_file(), words[2]
    return program


def check_launch(program: str, arguments: list[str]) -> str:
    if program == "torchrun":
        from torch.distributed.run import get_args_parser as launch_parser
    else:
        from accelerate.commands.launch import launch_command_parser as launch_parser
    args = launch_parser().parse_args(arguments)
    if getattr(args, "config_file", None) is not None:
        assert (ROOT / args.config_file).is_file(), args.config_file
    check = check_module if args.module else check_script
    check(args.training_script, args.training_script_args)
    return program


def check_script(name: str, arguments: list[str]) -> str:
    """A command line of train.py, without files that only the reader has."""
    assert name == "train.py", f"python {name} is not a command of this project"
    kept = [argument for argument in arguments if argument not in ("--help", "--print_config")]
    if "--config" in kept:
        place = kept.index("--config")
        if "NAME" in kept[place + 1]:
            del kept[place : place + 2]
    config = read_config(kept)
    from pipeline.models.create import check_model_name
    from pipeline.optim.optimizers import check_optimizer_name

    check_optimizer_name(config.optimizer)
    check_scheduler_name(config.scheduler)
    check_model_name(config.model_name)
    return name


def check_module(name: str, arguments: list[str]) -> str:
    """A command line of a module that python -m runs."""
    if name in OTHER_MODULES:
        return name
    path = ROOT / name.replace(".", "/")
    module = importlib.import_module(f"{name}.__main__" if path.is_dir() else name)
    parser = module.make_parser()
    if name == "pipeline.inspect":
        _, settings = module.read_arguments(arguments)
        read_config(settings)
    elif name == "pipeline.benchmark":
        args, settings = parser.parse_known_args(arguments)
        assert not settings or module.COMMANDS[args.command].settings
        read_config(settings)
    else:
        args = parser.read(arguments) if isinstance(parser, CommandParser) else parser.parse_args(arguments)
    if name == "pipeline.sweep":
        assert (ROOT / args.file).is_file(), args.file
    return name


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_every_command_of_a_page_is_accepted_by_its_parser(page):
    for line in command_lines(page.read_text()):
        programs_of(line)


def test_the_pages_show_every_command():
    lines = [line for page in PAGES for line in command_lines(page.read_text())]
    shown = {program for line in lines for program in programs_of(line)}
    modules = {f"pipeline.{name}" for name in (*COMMANDS, "sweep", "inspect", "report", "benchmark", "settings.reference")}
    assert shown == {"train.py", "torchrun", "accelerate", *modules, *OTHER_MODULES, *OTHER_PROGRAMS}


@pytest.mark.parametrize(
    "line",
    [
        "python train.py --schedular cosine",
        "python train.py --optimizer adamv",
        "python train.py --config pipeline/recipes/missing.yaml",
        "torchrun --nproc_per_nodes 2 train.py",
        "A=1 torchrun --nproc_per_node 2 train.py --lr fast",
        "accelerate launch --config_file accelerate_configs/missing.yaml train.py",
        "python -m pipeline.missing",
        "find /data | python -m pipeline.predict runs/NAME - --topk 3",
        "python -m pipeline.benchmark loop --modle_name resnet18",
        "python -m pipeline.sweep sweeps/missing.yaml",
        "sbatch accelerate_configs/missing.sh",
        "python other.py",
        "conda install torch",
    ],
)
def test_a_command_that_no_parser_accepts_is_found(line):
    with pytest.raises((AssertionError, ImportError, ValueError, SystemExit)):
        programs_of(line)


@pytest.mark.parametrize("path", [*RECIPES, *SWEEPS, *LAUNCH_FILES], ids=page_id)
def test_every_recipe_sweep_and_launch_file_opens_with_its_command(path):
    first, second, *_ = path.read_text().removeprefix("#!/bin/bash\n").splitlines()
    assert first.startswith("# ") and second.startswith("# ") and page_id(path) in first
    (command,) = simple_commands(re.search(r"(python|accelerate launch|sbatch) .*", first)[0])
    assert check_command(command) in ("train.py", "pipeline.sweep", "accelerate")


def test_accelerate_reads_every_launch_file():
    from accelerate.commands.config.config_args import load_config_from_file

    files = [path for path in LAUNCH_FILES if path.suffix == ".yaml"]
    assert len(files) >= 4
    for path in files:
        assert load_config_from_file(str(path)).num_processes == yaml.safe_load(path.read_text())["num_processes"]


@pytest.mark.parametrize("path", [*RECIPES, *SWEEPS, *LAUNCH_FILES], ids=page_id)
def test_every_recipe_sweep_and_launch_file_is_in_a_page(path):
    assert any(re.search(rf"\b{re.escape(path.name)}\b", page.read_text()) for page in PAGES)


def headings(text: str) -> list[str]:
    """The fragments of a page's headings, as GitHub forms them."""
    prose = re.sub(r"^ *```.*?^ *```$", "", text, flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.*)$", prose, re.MULTILINE)
    fragments = [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]
    assert len(set(fragments)) == len(fragments)
    return fragments


def links(text: str) -> list[str]:
    prose = re.sub(r"^ *```.*?^ *```$", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"\]\(([^)\s]+)\)", prose)


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_every_link_of_a_page_leads_to_a_file_and_to_a_heading_of_it(page):
    targets = [target for target in links(page.read_text()) if not target.startswith("https://")]
    for target in targets:
        name, _, fragment = target.partition("#")
        file = page.parent / name if name else page
        assert file.exists(), target
        assert not fragment or fragment in headings(file.read_text()), target


@pytest.mark.parametrize("page", [page for page in DOCS if "\nContents: " in page.read_text()], ids=page_id)
def test_the_contents_of_a_page_list_all_its_sections_in_order(page):
    text = page.read_text()
    contents = text.split("\nContents: ")[1].split("\n\n")[0]
    sections = headings("\n".join(re.findall(r"^## .*$", text, re.MULTILINE)))
    assert sections and [target.removeprefix("#") for target in links(contents)] == sections


def test_the_readme_has_at_most_220_lines_and_names_every_page():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 220
    index = text.split("\n## Documentation\n")[1].split("\n## ")[0]
    assert {f"docs/{page.name}" for page in DOCS} == set(links(index))
    assert "CONTRIBUTING.md" in links(text)


def test_the_readme_draws_the_rooms_on_their_floors():
    tree = (ROOT / "README.md").read_text().split("\n## The code\n")[1].split("\n## ")[0]
    floor, drawn = "", {}
    for line in re.findall(r"^    (.*)$", tree, re.MULTILINE):
        floor = line[:9].strip() or floor
        if room := re.match(r"[ \w]{9}(\w+)/ ", line):
            drawn[room[1]] = floor
    assert drawn == {**{room: f"floor {number}" for room, number in FLOORS.items()}, "recipes": "beside"}
    assert set(re.findall(r"(\w+)\.py", tree.split("report/")[0].split("floor 7")[1])) == COMMANDS


def test_the_picture_of_the_architecture_has_every_room():
    picture = (ROOT / "docs" / "architecture.md").read_text().split("    floor 7")[1].split("\n`recipes/`")[0]
    assert set(re.findall(r"(\w+)/", picture)) == FLOORS.keys()
    modules = {path.stem for path in (ROOT / "pipeline").rglob("*.py")}
    named = set(re.findall(r"\w+(?=,)", picture)) - {"speed", "memory"}
    assert len(named) > 30 and named <= modules


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_every_file_that_a_page_names_exists(page):
    text = page.read_text()
    paths = re.findall(r"(?<![\w/.])(?:pipeline|tests|docs|sweeps|accelerate_configs)/[\w./-]*\w", text)
    assert [path for path in paths if not (ROOT / path).exists() and "NAME" not in path] == []
    tests = {path.name for path in (ROOT / "tests").rglob("test_*.py")}
    assert set(re.findall(r"\btest_\w+\.py", text)) <= tests


def table(page: str, heading: str) -> list[list[str]]:
    """The cells of the first table below a heading, without its head."""
    rows = re.findall(r"^\|.*\|$", (ROOT / page).read_text().split(f"\n{heading}\n")[1].split("\n#")[0], re.MULTILINE)
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows[2:]]


def test_every_guarantee_of_resuming_names_test_files_that_exist():
    tests = {path.stem for path in (ROOT / "tests").rglob("test_*.py")}
    rows = table("docs/resuming.md", "## What a run survives")
    assert len(rows) > 20
    for *_, files in rows:
        named = re.findall(r"`(\w+)`", files)
        assert named and {f"test_{name}" for name in named} <= tests, files


def test_resuming_names_the_settings_that_may_change():
    from pipeline.run_folder.resume import FREE_SETTINGS

    text = (ROOT / "docs" / "resuming.md").read_text().split("### What may change\n\n")[1].split("\n\n")[0]
    assert set(re.findall(r"`(\w+)`", text)) - {"stream"} == FREE_SETTINGS


def test_the_table_of_optimizers_has_their_defaults():
    from pipeline.optim.optimizers import OPTIMIZERS

    rows = {name.strip("`"): [float(cell) for cell in cells] for name, _, *cells in table("docs/optimizers.md", "## Optimizers")}
    assert rows == {name: [row.lr, row.given_lr, row.weight_decay] for name, row in OPTIMIZERS.items()}
    schedules = [row[0].split("`")[1] for row in table("docs/optimizers.md", "## Learning-rate schedules")]
    assert schedules == list(SCHEDULES)


def test_the_table_of_known_sets_has_every_set():
    rows = {name.strip("`"): cells[:2] for name, *cells in table("docs/data.md", "## Known sets")}
    expected = {}
    for name, row in DATASETS.items():
        size = f"{row.image_size}x{row.image_size}, {'grey' if row.channels == 1 else 'color'}" if row.image_size else "photos"
        expected[name] = [f"`{row.hub_id}`" if row.hub_id else "in this package", size]
    assert rows == expected


def python_block(page: str, heading: str) -> str:
    block: str = (ROOT / page).read_text().split(f"\n{heading}\n")[1].split("```python\n")[1].split("```")[0]
    return block


def test_the_example_of_a_known_set_is_a_row():
    row = eval("{" + python_block("docs/data.md", "## Add a known set") + "}", vars(known_datasets).copy())["svhn"]
    assert isinstance(row, known_datasets.DatasetRow) and len(row.class_names) == 10 and not row.flip


def test_the_example_of_an_optimizer_is_a_row_that_steps(monkeypatch):
    import torch

    from pipeline.optim import optimizers

    monkeypatch.setattr(optimizers, "OPTIMIZERS", dict(optimizers.OPTIMIZERS))
    exec(python_block("docs/optimizers.md", "## Add an optimizer"), vars(optimizers).copy())
    weight = torch.nn.Parameter(torch.ones(3))
    weight.grad = torch.ones(3)
    row = optimizers.OPTIMIZERS["asgd"]
    row.build([{"params": [weight], **row.route(optimizers.MATRIX, Config(optimizer="asgd"))}], Config(), None).step()
    assert (weight < 1).all()


def test_every_requirement_is_explained():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    required = [re.split(r"[><=]", line)[0] for line in lines if not line.startswith("#")]
    assert [name for name, _ in table("docs/troubleshooting.md", "## Dependencies")] == required


def test_ci_runs_the_test_command_of_the_readme():
    commands = re.findall(r"^(python3 -m venv .*)$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert len(commands) == 2 and commands[0].endswith("train.py") and commands[1].endswith("pytest -n 2")
    assert commands[1] in (ROOT / ".ci" / "run").read_text().splitlines()
    assert commands[1] in (ROOT / "CONTRIBUTING.md").read_text().splitlines()


@pytest.mark.slow
def test_the_first_command_of_the_readme_trains_and_ends_in_a_table(tmp_path):
    """Without its installation, in an empty folder, and cut short."""
    first = re.findall(r"^python3 -m venv .* (train.py)$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert first == ["train.py"]
    done = run_process(str(ROOT / "train.py"), "--epochs=1", "--max_train_samples=64", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "test accuracy" in done.stdout and "resnet18_small_stem" in done.stdout
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert (run_dir / "model" / "model.safetensors").is_file()
