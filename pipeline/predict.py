"""`python -m pipeline.predict RUN|MODEL PATH...`: predicts the classes of images with a saved model and its preprocessing."""

import argparse
import contextlib
import csv
import io
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from pipeline.common import console
from pipeline.common.files import to_json, written_aside
from pipeline.settings.command_line import CommandParser, at_least, check_output, exit_status, one_of

if TYPE_CHECKING:
    from pipeline.inference.prediction import Prediction

ESCAPE = "backslashreplace"  # the error handler of encodings
LONGEST_NAME = 32  # in a table; ImageNet's names have up to 131 letters

# a label, its class number and its probability; the most probable first
Ranked = list[tuple[str, int, float]]


def json_lines(paths: Sequence[str], names: Sequence[str], top_k: int) -> tuple[str, Callable[[str, Ranked], str]]:
    """One JSON object per line: image, label and probability of the best class, and top, a list of the top_k classes."""

    def line(path: str, ranked: Ranked) -> str:
        top = [{"label": name, "class": number, "probability": value} for name, number, value in ranked]
        best = {"label": ranked[0][0], "probability": ranked[0][2]}
        return to_json({"image": path, **best, "top": top}, ensure_ascii=False) + "\n"

    return "", line


def csv_lines(paths: Sequence[str], names: Sequence[str], top_k: int) -> tuple[str, Callable[[str, Ranked], str]]:
    """A header, then one line per image: image, label_1, probability_1, label_2 and so on."""

    def line(path: str, ranked: Ranked) -> str:
        return csv_row([path, *(cell for name, _, value in ranked for cell in (name, f"{value:.6f}"))])

    numbers = range(1, min(top_k, len(names)) + 1)
    return csv_row(["image", *(f"{what}_{number}" for number in numbers for what in ("label", "probability"))]), line


def csv_row(cells: Sequence[str]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\r\n").writerow(cells)  # the writer quotes the characters of its line terminator
    return text.getvalue().removesuffix("\r\n") + "\n"


def table_lines(paths: Sequence[str], names: Sequence[str], top_k: int) -> tuple[str, Callable[[str, Ranked], str]]:
    """One line per image: its path, then columns of labels, shortened if long, and probabilities."""
    path_width, name_width = (max((len(console.on_one_line(text)) for text in texts), default=0) for texts in (paths, names))
    name_width = min(name_width, LONGEST_NAME)

    def line(path: str, ranked: Ranked) -> str:
        shown = [console.on_one_line(name) for name, _, _ in ranked]
        short = [name if len(name) <= name_width else f"{name[: name_width - 3]}..." for name in shown]
        cells = [f"{name:<{name_width}} {console.percent(value):>8}" for name, (_, _, value) in zip(short, ranked)]
        return f"{console.on_one_line(path):<{path_width}}  {'  '.join(cells)}\n"

    return "", line


FORMATS = {"table": table_lines, "jsonl": json_lines, "csv": csv_lines}


def make_parser() -> CommandParser:
    parser = CommandParser(prog="python -m pipeline.predict", description=__doc__)
    parser.add_argument("model", metavar="RUN|MODEL", help="a run, a timm folder, a Hub id or a timm model name")
    text = "image, folder (all images below it), quoted pattern, or - for a list of files on standard input"
    parser.add_argument("paths", metavar="PATH", nargs="+", help=text)
    parser.add_argument("--top_k", type=at_least(1), default=3, metavar="K", help="number of most probable classes to report")
    parser.add_argument("--format", type=one_of(*FORMATS), default="table", help="table, jsonl or csv")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write to this file instead of standard output")
    parser.add_argument("--batch_size", type=at_least(1), default=64, metavar="N", help="images at once")
    parser.add_argument("--device", type=one_of("auto", "cpu", "cuda", "mps"), default="auto", help="auto, cpu, cuda or mps")
    return parser


def run(args: argparse.Namespace) -> int:
    """Predicts and writes; returns 1 if a file could not be read, else 0. Raises ValueError without images or model."""
    from pipeline.inference import prediction  # imported after parsing, so that --help does not import torch
    from pipeline.inference.saved_model import load_saved_model

    check_output(args.output)
    device = prediction.choose_device(args.device)
    listed = prediction.read_list(sys.stdin.buffer) if "-" in args.paths else ()
    paths, problems, notes = prediction.find_images(args.paths, listed)
    for note in notes:
        console.warn(note)
    for problem in problems:
        print(f"error: {console.on_one_line(problem)}", file=sys.stderr, flush=True)
    if not paths:
        raise ValueError("No image was found. Pass images, folders, quoted patterns, or - and a list on standard input.")
    saved = load_saved_model(args.model)
    header, line = FORMATS[args.format](paths, saved.shown_names, args.top_k)
    predictions = prediction.predict(saved, paths, top_k=args.top_k, batch_size=args.batch_size, device=device)
    num_bad = len(problems)
    with output_file(args.output, is_data=args.format != "table") as out:
        out.write(header)
        # on a terminal the printed results show the progress
        shown = args.output is not None or not sys.stdout.isatty()
        with console.progress_bar(len(paths), 0, "predicting", shown, unit="image") as bar:
            for predicted in predictions:
                num_bad += write(predicted, out, line, saved.shown_names, bar)
        out.flush()
    if num_bad:
        done = len(paths) + len(problems) - num_bad
        print(f"{done:,} images predicted, {num_bad:,} could not be read.", file=sys.stderr)
    return 1 if num_bad else 0


@contextlib.contextmanager
def output_file(path: Path | None, is_data: bool) -> Iterator[TextIO]:
    """The file, which a reader sees once it is whole; None is standard output.

    A byte of a file name that is not UTF-8 becomes an escape, which is also an escape of JSON: \\udce9 is byte e9. is_data:
    whether standard output is UTF-8 in any locale, as the file is.
    """
    if path is None:
        if is_data and isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(encoding="utf-8", errors=ESCAPE)
        yield sys.stdout
    else:
        with written_aside(path) as aside, open(aside, "w", encoding="utf-8", errors=ESCAPE) as file:
            yield file


def write(predicted: "Prediction", out: TextIO, line: Callable[[str, Ranked], str], names: Sequence[str], bar: Any) -> int:
    """Writes a prediction and returns 0, or reports its problem on standard error and returns 1."""
    bar.update()
    if predicted.problem is not None:
        bar.write(f"error: {console.on_one_line(predicted.problem)}", file=sys.stderr)
        return 1
    ranked = [(names[k], k, value) for k, value in zip(predicted.classes, predicted.probabilities)]
    out.write(line(predicted.path, ranked))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Predicts; returns the exit status: 0 completed, 1 some files could not be read, 2 invalid input."""
    args = make_parser().read(argv)
    return exit_status(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
