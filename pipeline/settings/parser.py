"""Parses settings from the defaults, a YAML file and the command line, with one grammar. Errors are one line."""

import argparse
import dataclasses
import os
import re
import sys
import types
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn

import yaml

from pipeline.common import console
from pipeline.common.suggestions import did_you_mean
from pipeline.settings.checks import check_limits
from pipeline.settings.config import DEFAULTS, FIELDS, SECTIONS, TYPES, Config

RUN_MARKS = (".lock", "metrics.jsonl", "checkpoints")  # of a run's folder, beside config.yaml


class SettingsLoader(yaml.SafeLoader):
    """YAML that also accepts None and 1e-05, as users and `wandb agent` write them, and reads no and off as text."""


SettingsLoader.yaml_implicit_resolvers = {
    first: [
        (tag, pattern) for tag, pattern in resolvers if tag not in ("tag:yaml.org,2002:bool", "tag:yaml.org,2002:float")
    ]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
SettingsLoader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
SettingsLoader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"^None$"), ["N"])
SettingsLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.\d*|\.\d+|\d+(?=[eE]))([eE][-+]?\d+)?$|^[-+]?\.(inf|Inf|INF)$|^\.(nan|NaN|NAN)$"),
    list("-+.0123456789"),
)


def make_parser() -> Any:
    """A jsonargparse parser with one option for each field of Config, grouped by its sections."""
    import jsonargparse

    def load(text: str) -> Any:
        return yaml.load(text, SettingsLoader)

    jsonargparse.set_loader("settings", load, exceptions=(yaml.YAMLError,))
    parser = jsonargparse.ArgumentParser(
        prog="train.py",
        description="Train an image classifier. Without arguments: ResNet-18 on the embedded handwritten digits.",
        epilog="Arguments are applied to the defaults from left to right. docs/settings.md describes how values are written.",
        parser_mode="settings",
        allow_abbrev=False,
        exit_on_error=False,
    )
    parser.add_argument("--config", action="config", help="YAML file of settings. Later arguments override it.")
    group = parser
    for name, field in FIELDS.items():
        if name in SECTIONS:
            group = parser.add_argument_group(SECTIONS[name])
        default = getattr(DEFAULTS, name)
        limits = limits_in_words(field.metadata["limits"])
        text = f"{field.metadata['help']} Must be {limits}." if limits else field.metadata["help"]
        group.add_argument(f"--{name}", type=accepted(name), default=default, metavar=name.upper(), help=text)
    return parser


def accepted(name: str) -> Any:
    """The type of a command-line option: a setting with the value `no` also accepts False.

    YAML 1.1 reads `no` and `off` as False, so `wandb agent` passes `mixed_precision: no` as --mixed_precision=False.
    """
    return TYPES[name] | Literal[False] if says_no(name) else TYPES[name]


def says_no(name: str) -> bool:
    """Whether `no` is one of the values of a setting."""
    return "no" in choices(TYPES[name])


def limits_in_words(limits: dict[str, float]) -> str:
    """`{"above": 0, "at_most": 1}` as 'above 0 and at most 1'; empty without limits."""
    return " and ".join(f"{word.replace('_', ' ')} {bound}" for word, bound in limits.items())


def type_in_words(hint: Any) -> str:
    """A type in words: `float | None` is 'a number or null'."""
    if typing.get_origin(hint) is Literal:
        words = ", ".join(typing.get_args(hint))
        return f"one of {words}" if len(typing.get_args(hint)) > 1 else words
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        *others, last = (type_in_words(part) for part in typing.get_args(hint))
        return f"{', '.join(others).replace(' or ', ', ')} or {last}"
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}
    names |= {
        list[str]: "a list of texts",
        list[float]: "a list of numbers",
        dict[int, int]: "a map such as {5: 256, 10: 512}",
        dict[str, Any]: "a map such as {betas: [0.9, 0.99]}",
    }
    return names[hint]


def choices(hint: Any) -> list[str]:
    """The values of a Literal, also within a union."""
    if typing.get_origin(hint) is Literal:
        return list(typing.get_args(hint))
    return [word for part in typing.get_args(hint) for word in choices(part)]


def explain(message: str) -> str:
    """A message of jsonargparse as one line: the setting, the value received and what is expected."""
    unknown = re.search(r"Option '(.+?)' is not accepted|unrecognized arguments: (.*)", message)
    if unknown:
        name = (unknown[1] or unknown[2]).split()[0].split("=")[0].lstrip("-")
        if not name or (unknown[2] and not unknown[2].startswith("-")):
            return f"Unexpected argument {unknown[2]!r}. Pass settings as --name value. All settings: python train.py --help"
        return f"Unknown setting '{name}'.{did_you_mean(name, FIELDS)} All settings: python train.py --help"
    if bare := re.search(r"argument --(\w+)\+?: expected one argument", message):
        return f"--{bare[1]} needs a value: {type_in_words(TYPES[bare[1]]) if bare[1] in TYPES else 'a YAML file'}."
    if file := re.search(r"""Parser key "config": .*?: '(.+)'""", message):
        return f"--config {file[1]} is not a file. Pass a YAML file of settings."
    if message.startswith(("Problems parsing config: ", "Unexpected config: ")):
        return f"A file of --config is not a map of settings in YAML: {' '.join(message.split(': ', 1)[1].split())}"
    key = re.search(r'Parser key "(\w+)"', message)
    if key and key[1] in TYPES:
        hint = TYPES[key[1]]
        value = re.search(r"(?:Given value|Got value): (.*)", message)
        received = f" {value[1].strip()!r}" if value else ""
        suggestion = did_you_mean(value[1].strip(), choices(hint)) if value else ""
        return f"Setting {key[1]}{received} is not {type_in_words(hint)}.{suggestion}"
    return " ".join(message.split())


def parse_config(argv: Sequence[str] | None = None) -> Config:
    """The settings of a command line. Exits with status 2 and one line on standard error if they are invalid.

    argv: the arguments without the program name; None reads sys.argv.
    """
    console.escape_unprintable()
    arguments = list(sys.argv[1:] if argv is None else argv)
    # A W&B agent adds an argument such as --_wandb to a run that it restarts.
    arguments = [argument for argument in arguments if not argument.startswith("--_wandb")]
    try:
        return read_config(arguments)
    except (argparse.ArgumentError, ValueError) as error:
        fail(str(error))


def read_config(arguments: list[str]) -> Config:
    """The settings of the arguments. Raises ValueError, with a one-line message, if they are invalid."""
    return parsed(lambda parser: parser.parse_args(in_own_folder(arguments)))


def checked(config: Config) -> Config:
    """The settings of a Config that Python code made, checked as those of a command line. Raises ValueError likewise."""
    return parsed(lambda parser: parser.parse_object(dataclasses.asdict(config)))


def parsed(parse: Callable[[Any], Any]) -> Config:
    """The settings that `parse` reads with the parser, checked. Raises ValueError, with a one-line message."""
    try:
        values = vars(parse(make_parser()))
    except argparse.ArgumentError as error:
        raise ValueError(explain(str(error))) from error
    values = {name: values[name] for name in FIELDS}
    config = Config(**{name: as_declared(name, value) for name, value in values.items()})
    check_limits(config)
    return config


def in_own_folder(arguments: list[str]) -> list[str]:
    """The arguments, with the output_dir and run_name of its folder after each `--config` that names the config.yaml of a run.

    So a run resumes from any working folder, and after its folder has moved. Later arguments override them.
    """
    placed: list[str] = []
    for number, argument in enumerate(arguments):
        placed.append(argument)
        name, _, value = argument.partition("=")
        if name != "--config" and arguments[number - 1 : number] != ["--config"]:
            continue
        path = Path(value if name == "--config" else argument).expanduser()
        if path.name == "config.yaml" and any((path.parent / mark).exists() for mark in RUN_MARKS):
            run_dir = Path(os.path.abspath(path)).parent if path.parent.name in ("", "..") else path.parent
            placed += [f"--output_dir={run_dir.parent}", f"--run_name={run_dir.name}"]
    return placed


def as_declared(name: str, value: Any) -> Any:
    """Converts a whole number to float for a float setting, and False to the word no; other values are unchanged."""
    if value is False and says_no(name):
        return "no"
    return float(value) if TYPES[name] in (float, float | None) and value is not None else value


def fail(message: str) -> NoReturn:
    """Ends the program with status 2 and the message on standard error."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def from_yaml(path: Path) -> Config:
    """The settings in the config.yaml of a run. Raises ValueError if the file is missing or invalid."""
    return read_config(["--config", str(path)])
