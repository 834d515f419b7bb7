"""Reads and checks a W&B sweep file, and fills in the command of a trial."""

import json
import math
import os
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pipeline.common.suggestions import did_you_mean
from pipeline.settings.config import FIELDS, Config
from pipeline.settings.parser import as_declared, read_config, says_no
from pipeline.sweep.space import Space, read_parameter

# apiVersion to description affect W&B only
KEYS = ("apiVersion", "kind", "entity", "project", "description", "name", "program", "command", "method", "metric",
        "parameters", "early_terminate", "run_cap")  # fmt: skip
FREE_KEYS = (
    "apiVersion",
    "kind",
    "entity",
    "project",
    "description",
    "name",
    "run_cap",
)  # may change when a sweep is resumed
METHODS = ("grid", "random", "bayes")
GOALS = ("minimize", "maximize")
FIGURES = ("accuracy", "loss", "top5_accuracy")
METRICS = [f"{split}/{key}" for split in ("val", "train_epoch", "test") for key in FIGURES]
METRICS += [f"{split}/{key}" for split in ("val", "test") for key in ("balanced_accuracy", "macro_f1", "roc_auc")]
METRICS += [f"val/ema_{key}" for key in (*FIGURES, "balanced_accuracy", "macro_f1", "roc_auc")] + ["train/loss"]
DEFAULT_COMMAND = ("${env}", "${interpreter}", "${program}", "${args}")
OURS = ("run_name", "resume", "dry_run")  # settings that the sweep sets for each trial

# how each macro writes a trial's settings
ARGUMENT_FORMS = {
    "args": lambda settings: [f"--{name}={value}" for name, value in settings.items()],
    "args_no_equals": lambda settings: [word for name, value in settings.items() for word in (f"--{name}", str(value))],
    "args_no_hyphens": lambda settings: [f"{name}={value}" for name, value in settings.items()],
    "args_no_boolean_flags": lambda settings: [
        f"--{name}" if value is True else f"--{name}={value}" for name, value in settings.items() if value is not False
    ],
    "args_json": lambda settings: [json.dumps(settings)],
}
MACROS = (*ARGUMENT_FORMS, "env", "interpreter", "program")


@dataclass(frozen=True)
class Hyperband:
    """W&B's early termination: at each of the iterations, counted from 1, the best 1/eta of all trials continue."""

    iterations: tuple[int, ...]
    eta: float
    strict: bool


@dataclass(frozen=True)
class Sweep:
    """A sweep file. limit: the largest number of trials, from run_cap and the size of the grid; None for no limit."""

    name: str
    content: Mapping[str, Any]
    method: str
    metric: str
    maximize: bool
    target: float | None
    space: Space
    command: tuple[str, ...]
    program: str
    hyperband: Hyperband | None
    limit: int | None

    @property
    def aim(self) -> str:
        """Goal and metric, such as `maximize val/accuracy`."""
        worst = f" (the {'highest' if self.maximize else 'lowest'} ranks first)" if self.is_reversed else ""
        return f"{GOALS[self.maximize]} {self.metric}{worst}"

    @property
    def is_reversed(self) -> bool:
        """Whether the goal is the lowest accuracy or the highest loss."""
        return self.maximize == self.metric.endswith("loss")

    @property
    def fixed_content(self) -> dict[str, Any]:
        """The content that may not change when a sweep is resumed, with JSON types."""
        kept = {key: value for key, value in self.content.items() if key not in FREE_KEYS}
        return dict(json.loads(json.dumps(kept, default=str)))


def read_sweep(path: Path) -> Sweep:
    """The sweep of a file. Raises ValueError, which names the file, if the sweep is invalid."""
    try:
        content = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ValueError(f"Cannot read the sweep file {path}: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    try:
        return sweep_of(content, path.stem)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def sweep_of(content: Any, stem: str) -> Sweep:
    """The sweep of a file's content. stem: the name of a sweep without one. Raises ValueError for an invalid key or value."""
    if not isinstance(content, dict):
        raise ValueError("A sweep file must be a map with the keys method, metric and parameters.")
    check_keys("The sweep file", content, KEYS)
    method = one_of("method", content.get("method"), METHODS)
    metric = read_map("metric", content, ("name", "goal", "target"))
    if "name" not in metric:
        raise ValueError(f"metric needs a name; write metric: {{name: {METRICS[0]}, goal: maximize}}.")
    name = one_of("metric name", metric["name"], METRICS)
    maximize = one_of("metric goal", metric.get("goal", "minimize"), GOALS) == "maximize"
    space = read_space(content.get("parameters"))
    cap = content.get("run_cap")
    if cap is not None and (isinstance(cap, bool) or not isinstance(cap, int) or cap < 1):
        raise ValueError(f"run_cap is {cap!r}; it must be a whole number of 1 or more.")
    bounds = [cap, space.grid_size() if method == "grid" else None]
    sweep_name = str(content.get("name") or stem)
    if Path(sweep_name).name != sweep_name:
        raise ValueError(f"name {sweep_name!r} must be a plain folder name.")
    return Sweep(
        name=sweep_name,
        content=content,
        method=method,
        metric=name,
        maximize=maximize,
        target=number("metric target", metric.get("target"), None),
        space=space,
        command=read_command(content.get("command")),
        program=str(content.get("program", "train.py")),
        hyperband=read_hyperband(content),
        limit=min((bound for bound in bounds if bound is not None), default=None),
    )


def check_keys(what: str, given: Iterable[Any], known: Iterable[str]) -> None:
    for key in given:
        if key not in known:
            raise ValueError(
                f"{what} has an unknown key {key!r}.{did_you_mean(str(key), known)} Known: {', '.join(known)}."
            )


def one_of(what: str, value: Any, known: Iterable[str]) -> str:
    if value not in known:
        raise ValueError(f"{what} is {value!r}.{did_you_mean(str(value), known)} Known: {', '.join(known)}.")
    return str(value)


def read_map(what: str, content: Mapping[str, Any], keys: Iterable[str]) -> dict[str, Any]:
    part = content.get(what, {})
    if not isinstance(part, dict):
        raise ValueError(f"{what} is {part!r}, not a map.")
    check_keys(what, part, keys)
    return part


def number(what: str, value: Any, default: float | None) -> float | None:
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{what} is {value!r}, not a number.")
    return value


def read_space(parameters: Any) -> Space:
    """Raises ValueError for parameters that are no settings of train.py, or that the sweep sets itself."""
    if not isinstance(parameters, dict) or not parameters:
        raise ValueError("parameters must be a map of settings, {lr: {values: [0.1, 0.01]}} for example.")
    for name in parameters:
        if name not in FIELDS:
            raise ValueError(f"Unknown setting {name!r} in parameters.{did_you_mean(str(name), FIELDS)}")
        if name in OURS:
            raise ValueError(f"{name} cannot be a parameter: the sweep sets it for each trial. Remove it.")
    space = Space(tuple(read_parameter(name, with_words(name, spec)) for name, spec in parameters.items()))
    if "output_dir" in space.varied:
        raise ValueError("output_dir cannot be varied: the folders of all trials are in the sweep's folder. Give it one value.")
    return space


def with_words(name: str, spec: Any) -> Any:
    """A parameter's keys with False replaced by `no`, which YAML 1.1 reads as False, if that is a value of the setting."""
    if not isinstance(spec, dict) or not says_no(name):
        return spec
    values = {key: as_declared(name, spec[key]) for key in ("value",) if key in spec}
    if isinstance(spec.get("values"), list):
        values["values"] = [as_declared(name, value) for value in spec["values"]]
    return {**spec, **values}


def read_hyperband(content: Mapping[str, Any]) -> Hyperband | None:
    """The iterations at which trials are compared: min_iter * eta^i for i = 0, 1, ..., or max_iter / eta^i for i = 1..s.

    None without early_terminate. Raises ValueError for invalid values. https://docs.wandb.ai/models/sweeps/sweep-config-keys
    """
    if "early_terminate" not in content:
        return None
    part = read_map("early_terminate", content, ("type", "min_iter", "max_iter", "s", "eta", "strict"))
    one_of("early_terminate type", part.get("type"), ("hyperband",))
    eta = number("early_terminate eta", part.get("eta"), 3.0) or 0.0
    least, most = (number(f"early_terminate {key}", part.get(key), None) for key in ("min_iter", "max_iter"))
    brackets = number("early_terminate s", part.get("s"), None)
    if eta <= 1:
        raise ValueError(f"early_terminate eta is {eta:g}; it must be above 1.")
    if most is not None and brackets is not None:
        iterations = [int(most / eta**power) for power in range(1, int(brackets) + 1)]
    elif least is not None and most is None and least >= 1:
        iterations = [int(least * eta**power) for power in range(int(math.log(1e6, eta)) + 1)]
    else:
        raise ValueError("early_terminate needs min_iter (1 or more), or max_iter and s.")
    iterations = sorted({iteration for iteration in iterations if iteration >= 1})
    if not iterations:
        raise ValueError(f"early_terminate has no iteration of 1 or more: max_iter {most}, s {brackets}, eta {eta:g}.")
    return Hyperband(tuple(iterations), eta, bool(part.get("strict", False)))


def read_command(words: Any) -> tuple[str, ...]:
    """The words of a trial's command. Raises ValueError for an unknown macro, and if it does not pass on the settings."""
    if words is None:
        return DEFAULT_COMMAND
    if not isinstance(words, list) or not words:
        raise ValueError(
            f"command is {words!r}; it must be a list of words, [{', '.join(DEFAULT_COMMAND)}] for example."
        )
    command = tuple(str(word) for word in words)
    for macro in (match[1] for word in command for match in re.finditer(r"\$\{([^}:]*)\}", word)):
        if macro not in MACROS:
            raise ValueError(f"Unknown macro ${{{macro}}} in command.{did_you_mean(macro, MACROS)}")
    if not any(word == f"${{{form}}}" for word in command for form in ARGUMENT_FORMS):
        raise ValueError("command has no ${args}, so every trial would have the same settings. Add ${args}.")
    return command


def fill_command(sweep: Sweep, settings: Mapping[str, Any]) -> list[str]:
    """The command of a trial with these settings, as `wandb agent` forms it, but with this Python interpreter."""
    forms: dict[str, list[str]] = {f"${{{name}}}": form(settings) for name, form in ARGUMENT_FORMS.items()}
    forms |= {"${env}": ["/usr/bin/env"], "${interpreter}": [sys.executable], "${program}": [sweep.program]}
    words = [word for part in sweep.command for word in forms.get(part, [part])]
    return [re.sub(r"\$\{envvar:(\w+)\}", lambda match: os.environ.get(match[1], match[1]), word) for word in words]


def fixed_arguments(sweep: Sweep) -> list[str]:
    """The arguments of train.py in the command besides ${args}."""
    words = list(sweep.command)
    start = max((i for i, word in enumerate(words) if word in ("${program}", sweep.program)), default=len(words)) + 1
    return [word for word in words[start:] if not word.startswith("${")]


def check_trials(sweep: Sweep) -> list[Config]:
    """The settings of a few trials that together contain every value of the file.

    Raises ValueError if train.py would reject one.
    """
    if not Path(sweep.program).is_file():
        raise ValueError(f"There is no program {sweep.program} in {Path.cwd()}. Change to the folder that contains it.")
    given = fixed_arguments(sweep)
    return [read_config([*given, *ARGUMENT_FORMS["args"](point)]) for point in sweep.space.examples()]
