"""`python -m pipeline.report RUN... | SWEEP | FOLDER`: writes a report on runs into one folder.

OUTPUT/report.html   one page that needs no other file and no network
OUTPUT/report.md     the same in Markdown
OUTPUT/results.csv   a line per run
OUTPUT/figures/      every figure as PNG and SVG
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from pipeline.common.console import plural
from pipeline.common.files import folder_written_aside
from pipeline.pages.render import html_page, markdown_page
from pipeline.report.comparison import ranked
from pipeline.report.content import best_tested, make_report
from pipeline.report.read_sweeps import read_records
from pipeline.report.tables import results_csv
from pipeline.settings.command_line import CommandFailed, CommandParser, at_least, exit_status, fraction

PAGE = "report.html"


def make_parser() -> CommandParser:
    description = "Write a report on runs into one folder: an HTML page, Markdown, figures and a CSV file."
    parser = CommandParser(prog="python -m pipeline.report", description=description)
    text = "run folders, a sweep's folder, or a folder of runs"
    parser.add_argument("paths", nargs="+", type=Path, metavar="RUN|SWEEP|FOLDER", help=text)
    text = "folder to write; an earlier report in it is replaced"
    parser.add_argument("--output", type=Path, default=Path("report"), metavar="DIR", help=text)
    text = "mark runs with at least this test accuracy, for example 0.9"
    parser.add_argument("--target", type=fraction, metavar="FRACTION", help=text)
    text = "show the best run's N most confident mistakes; loads its model and dataset"
    parser.add_argument("--mistakes", type=at_least(0), default=0, metavar="N", help=text)
    text = "with --mistakes: where that run's dataset is now, if it has moved"
    parser.add_argument("--dataset", metavar="PATH", help=text)
    return parser


def check_output(folder: Path) -> None:
    """Raises ValueError if the folder contains anything but a report, or its parent does not exist."""
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir()) and not (folder / PAGE).is_file()):
        raise ValueError(f"--output {folder} exists and is not a report. Choose a new folder, or an earlier report.")
    if not folder.resolve().parent.is_dir():
        raise ValueError(f"There is no folder {folder.parent} for --output {folder}. Create it first.")


def write_folder(folder: Path, files: Mapping[str, bytes]) -> None:
    """Writes the files, whose names have at most one folder, in place of an existing folder."""
    with folder_written_aside(folder) as aside:
        for name, content in files.items():
            (aside / name).parent.mkdir(exist_ok=True)
            (aside / name).write_bytes(content)


def write_report(
    paths: Sequence[Path], output: Path, target: float | None, num_mistakes: int, moved_to: str | None
) -> str:
    """Reads the runs, writes the report and returns a line about it. Raises ValueError before writing for invalid input."""
    check_output(output)
    if moved_to is not None and not num_mistakes:
        raise ValueError("--dataset is read for --mistakes only. Add --mistakes N, or remove it.")
    runs, sweep = read_records(paths)
    mistakes = None
    if num_mistakes:
        tested = best_tested(runs, sweep)
        if tested is None:
            raise ValueError("--mistakes requires a tested run, and none of these runs was tested. Remove --mistakes.")
        from pipeline.inference.mistakes import most_confident_mistakes

        mistakes = most_confident_mistakes(tested.path, num_mistakes, moved_to)
    report = make_report(runs, sweep, target, mistakes)
    files = {
        PAGE: encoded(html_page(report.page, report.looks)),
        "report.md": encoded(markdown_page(report.page)),
        "results.csv": encoded(results_csv(runs, ranked(runs, sweep), sweep)),
    }
    write_folder(output, files | {f"figures/{name}": content for name, content in report.files.items()})
    return f"{plural(len(runs), 'run')}, {len(report.files)} figure files: {output / PAGE}"


def run(args: argparse.Namespace) -> int:
    """Writes the report and prints its path. Raises ValueError for invalid input, CommandFailed if it cannot be written."""
    try:
        print(write_report(args.paths, args.output, args.target, args.mistakes, args.dataset))
    except OSError as error:
        raise CommandFailed(f"The report could not be written: {error}") from error
    return 0


def encoded(text: str) -> bytes:
    """The text in UTF-8. Bytes of paths that are not UTF-8 become escapes, as on the terminal."""
    return text.encode(errors="backslashreplace")


def main(argv: Sequence[str] | None = None) -> int:
    """Writes a report; returns the exit status: 0 completed, 1 the report could not be written, 2 invalid input."""
    args = make_parser().read(argv)
    return exit_status(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
