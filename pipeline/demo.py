"""`python -m pipeline.demo RUN|MODEL`: serves a page that classifies the picture you drop, and shows which parts of it matter.

The examples are test images of the run. `--space FOLDER` writes a Hugging Face Space instead: app.py, requirements.txt, the
model and the code that it needs. Requires Gradio and captum: pip install gradio captum.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from pipeline.common.console import say
from pipeline.settings.command_line import CommandParser, at_least, exit_status, port


def make_parser() -> CommandParser:
    parser = CommandParser(prog="python -m pipeline.demo", description=__doc__)
    parser.add_argument("model", metavar="RUN|MODEL", help="a run, a timm folder, a Hub id or a timm model name")
    parser.add_argument("--port", type=port, metavar="N", help="port on 127.0.0.1; default: the first free one from 7860")
    text = "number of test images of the run to offer as examples"
    parser.add_argument("--examples", type=at_least(0), default=8, metavar="N", help=text)
    parser.add_argument("--dataset", metavar="PATH", help="where the run's dataset is now, if it has moved")
    parser.add_argument("--space", type=Path, metavar="FOLDER", help="write a Hugging Face Space into this new folder")
    return parser


def run(args: argparse.Namespace) -> int:
    """Serves the demo or writes the Space. Raises ValueError for invalid input."""
    from tempfile import TemporaryDirectory

    from pipeline.inference.demo_app import check_packages, import_gradio, launch, make_app
    from pipeline.inference.demo_space import check_new, title_of, write_examples, write_space
    from pipeline.inference.saved_model import load_saved_model

    check_packages()
    if args.space is not None:
        check_new(args.space)
    else:
        import_gradio()  # before there is a temporary folder: a signal during an import ends the process at once
    saved = load_saved_model(args.model)
    with TemporaryDirectory() as folder:
        examples = write_examples(saved, Path(folder), args.examples, args.dataset)
        if args.space is not None:
            write_space(saved, args.space, examples)
            say(f"{args.space}: run it with `python app.py`, or push it to a Space of the Hugging Face Hub.")
        else:
            launch(make_app(saved, examples, title_of(saved)), args.port)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Serves the demo or writes the Space; returns the exit status: 0 completed, 1 it could not be written, 2 invalid input."""
    args = make_parser().read(argv)
    return exit_status(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
