"""Terminal output: messages, warnings, errors, the progress bar, the line of an epoch, tables."""

import contextlib
import io
import os
import sys
import unicodedata
from collections.abc import Iterable
from importlib import import_module
from importlib.util import find_spec
from typing import Any, TextIO

UNPRINTABLE = ("Cc", "Cs", "Zl", "Zp")  # Unicode categories: control characters, surrogates, separators of lines and paragraphs
ESTIMATE_AFTER_SECONDS = 0.5  # shorter loops show no bar


def escape_unprintable() -> None:
    """Makes standard output and error print a character that their encoding lacks as an escape, instead of failing.

    So in an ASCII terminal, and for file names that are not UTF-8. A closed stream becomes the null device, so that no file gets
    its descriptor. Programs call it once, at their start.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def on_one_line(text: str) -> str:
    """The text with its control characters, line ends and undecodable bytes as escapes, such as \\r."""
    return "".join(repr(letter)[1:-1] if unicodedata.category(letter) in UNPRINTABLE else letter for letter in text)


def say(message: str, shown: bool = True, file: TextIO | None = None) -> None:
    """Prints a message. Ignores an OSError (a full disk, a closed pipe), which must not end a run."""
    if shown:
        with contextlib.suppress(OSError):
            print(message, file=file, flush=True)


def warn(message: str) -> None:
    say(f"warning: {message}", file=sys.stderr)


def error(message: object) -> None:
    """Prints the error that ends the program, with the rank if there are several processes."""
    number = os.environ.get("WORLD_SIZE", "1")
    where = f" in process {os.environ.get('RANK')} of {number}" if number != "1" else ""
    say(f"error{where}: {message}", file=sys.stderr)


def progress_bar(total: int, initial: int, description: str, shown: bool, unit: str = "step") -> Any:
    """A tqdm bar, in a notebook a notebook's. Hidden if shown is false or standard error is neither a terminal nor a notebook's.

    Without ipywidgets, a notebook shows the bar as text.
    """
    notebook = in_notebook()
    kind = import_module("tqdm.notebook" if notebook and find_spec("ipywidgets") else "tqdm").tqdm
    hidden = not shown or not (notebook or sys.stderr.isatty())
    return kind(
        total=total,
        initial=initial,
        desc=description,
        unit=unit,
        leave=False,
        disable=hidden,
        delay=ESTIMATE_AFTER_SECONDS,
    )


def in_notebook() -> bool:
    """Whether this process is the kernel of a notebook, which has a configuration of its own in IPython's shell."""
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    return shell is not None and "IPKernelApp" in shell.config


def plural(number: int, noun: str, many: str | None = None) -> str:
    """The number with the noun: 1 epoch, 2 epochs. many: the plural, if it is not the noun with an s."""
    return f"{number} {noun if number == 1 else many or noun + 's'}"


def percent(fraction: float | None) -> str:
    return "-" if fraction is None else f"{100 * fraction:.2f} %"


def duration(seconds: float) -> str:
    """Seconds as text: 41 s, 3 min 05 s, 2 h 07 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def epoch_line(
    number: int, epochs: int, entry: dict[str, Any], lr: float, batch_size: int, is_best: bool, monitor: str = "accuracy"
) -> str:
    """The line of an epoch on the terminal. monitor: the metric that decides the best epoch."""
    train, val = entry["train"], entry["val"]
    monitored = "" if monitor in ("accuracy", "loss") else f" {monitor} {percent(val[monitor]):>8}"
    width = len(str(epochs))
    return (
        f"epoch {number:>{width}}/{epochs}  train loss {train['loss']:.4f} accuracy {percent(train['accuracy']):>8}"
        f"  val loss {val['loss']:.4f} accuracy {percent(val['accuracy']):>8}{monitored}"
        f"  lr {lr:<7.2g}  batch {batch_size}  {entry['images_per_second']:,.0f} images/s{'  best' if is_best else ''}"
    )


def table(rows: Iterable[tuple[str, str]]) -> str:
    """Two aligned columns, the first as wide as its longest entry."""
    rows = list(rows)
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)
