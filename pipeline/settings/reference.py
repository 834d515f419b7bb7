"""Write docs/settings.md: how a value is read, then every setting by section with its type, default and meaning.

python -m pipeline.settings.reference > docs/settings.md
"""

import json
import sys
from collections.abc import Sequence
from typing import Any

from pipeline.settings.command_line import CommandParser
from pipeline.settings.config import DEFAULTS, FIELDS, SECTIONS, TYPES
from pipeline.settings.parser import limits_in_words, type_in_words

HEAD = """\
# Settings

This page lists every setting of `train.py` with its type, default and meaning. It is generated from `Config` in
`pipeline/settings/config.py`. Do not edit it; run:

```sh
python -m pipeline.settings.reference > docs/settings.md
```

Contents: [How settings are read](#how-settings-are-read) · [How values are written](#how-values-are-written) ·
{contents}

## How settings are read

```sh
python train.py                                                              # the defaults
python train.py --config pipeline/recipes/cifar10_fast.yaml                  # values of a file
python train.py --config pipeline/recipes/cifar10_fast.yaml --lr 0.01        # one of them overridden
python train.py --config pipeline/recipes/cifar10_fast.yaml --print_config   # prints all settings as YAML and exits
python train.py --help                                                       # the tables below in the terminal
```

A run starts with the defaults below and applies its arguments from left to right:

- `--config FILE.yaml` sets what the file contains. The file maps names of settings to values; it may contain any number of
  them. `--config` may be repeated.
- `--name value` and `--name=value` set one setting. Every setting needs a value: `--pretrained true`, not `--pretrained`.

Settings are checked before any data is read. A misspelled name, a value of another type, a number outside its limits or a
contradiction ends the command with status 2 and one line that states what is wrong. A setting that has no effect because of
another one causes a warning.

The settings of a run are written to its `config.yaml`, which `--config` reads. Sweep files use the same names.

## How values are written

Files and command lines use one grammar, which is YAML with three changes: `None` is `null`, `1e-05` is a number, and `yes`,
`no`, `on` and `off` are text, so `mixed_precision: no` needs no quotes. On a command line, quote lists and maps for the shell.

| kind | in a file | on a command line |
| --- | --- | --- |
| number | `lr: 0.00001`, `lr: 1e-5`, `lr: 1e-05` | `--lr 1e-05` |
| true or false | `pretrained: true` | `--pretrained true` |
| text | `dataset: cifar10` | `--dataset cifar10` |
| no value | `lr: null` | `--lr null` |
| list | `step_epochs: [15, 25]` | `--step_epochs '[15, 25]'` |
| map | `batch_size_schedule: {{5: 256, 10: 512}}` | `--batch_size_schedule '{{5: 256, 10: 512}}'` |

A setting whose default is `null` is optional, or the run chooses its value; the last column says which.
"""


def reference_text() -> str:
    """The content of docs/settings.md."""
    contents = " · ".join(f"[{title}](#{anchor(title)})" for title in SECTIONS.values())
    lines = [HEAD.format(contents=contents)]
    for name, field in FIELDS.items():
        if name in SECTIONS:
            lines += [f"\n## {SECTIONS[name]}\n", "| setting | type | default | meaning |", "| --- | --- | --- | --- |"]
        kind = ", ".join(filter(None, [type_in_words(TYPES[name]), limits_in_words(field.metadata["limits"])]))
        lines.append(f"| `{name}` | {kind} | `{written(getattr(DEFAULTS, name))}` | {field.metadata['help']} |")
    return "\n".join(lines).replace("\n\n\n", "\n\n") + "\n"


def anchor(title: str) -> str:
    """The fragment of a heading's link, as GitHub forms it."""
    return title.lower().replace(" ", "-")


def written(value: Any) -> str:
    """A default as a file or a command line would give it."""
    return value if isinstance(value, str) else json.dumps(value)


def make_parser() -> CommandParser:
    return CommandParser(prog="python -m pipeline.settings.reference", description=__doc__)


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the page; returns the exit status 0."""
    make_parser().read(argv)
    sys.stdout.write(reference_text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
