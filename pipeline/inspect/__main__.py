"""`python -m pipeline.inspect DATASET`: shows a dataset before training, on one page that needs no other file and no network.

Splits and classes, samples, the first training batches as a run with the same settings makes them, duplicates within and
across splits, sizes and brightness. `--features MODEL` adds near-duplicates by features and labels that look wrong.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from pipeline.common.console import say
from pipeline.common.files import to_json, write_atomically
from pipeline.settings.command_line import CommandFailed, CommandParser, at_least, check_output, exit_status
from pipeline.settings.config import FIELDS

MOST_IMAGES = 20_000


def make_parser() -> CommandParser:
    settings = "Every setting of train.py is accepted after DATASET: the training batches are made with it."
    parser = CommandParser(prog="python -m pipeline.inspect", description=__doc__, epilog=settings)
    parser.add_argument("dataset", metavar="DATASET", help="as --dataset of train.py; the first argument")
    text = "find near-duplicates and doubtful labels by the features of this model: a run, a folder, a Hub id or a timm name"
    parser.add_argument("--features", metavar="MODEL", help=text)
    text = "examine at most N images, each split and class in proportion"
    parser.add_argument("--max_images", type=at_least(2), default=MOST_IMAGES, metavar="N", help=text)
    parser.add_argument("--output", type=Path, default=Path("inspect.html"), metavar="FILE", help="page to write")
    parser.add_argument("--json", action="store_true", help="also print what was found as one JSON object")
    return parser


def read_arguments(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """The command's own arguments, and the settings of train.py. Exits with status 2 for an unknown argument."""
    parser = make_parser()
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments and arguments[0].startswith("-") and arguments[0] not in ("-h", "--help"):
        parser.error(f"The first argument is {arguments[0]!r}; it must be the dataset.")
    args, settings = parser.parse_known_args(arguments)
    known = [f"--{name}" for name in ("config", *FIELDS)]
    for argument in settings:
        if argument.startswith("--") and argument.split("=")[0] not in known:
            parser.fail_for_unknown(argument, known)
    return args, settings


def run(args: argparse.Namespace, settings: list[str]) -> int:
    """Writes the page. Raises ValueError for invalid input, CommandFailed if the page cannot be written."""
    from pipeline.settings.parser import read_config

    check_output(args.output)
    config = read_config([*settings, f"--dataset={args.dataset}"])
    from pipeline.inspect.content import inspect

    page, facts = inspect(config, args.max_images, args.features)
    try:
        write_atomically(args.output, page.encode(errors="backslashreplace"))
    except OSError as error:
        raise CommandFailed(f"{args.output} could not be written: {error.strerror or error}.") from error
    if args.json:
        print(to_json(facts))
    say(f"{facts['examined']:,} of {facts['images']:,} images examined: {args.output}", file=sys.stderr if args.json else None)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Inspects a dataset; returns the exit status: 0 completed, 1 the page could not be written, 2 invalid input."""
    args, settings = read_arguments(argv)
    return exit_status(lambda: run(args, settings))


if __name__ == "__main__":
    sys.exit(main())
