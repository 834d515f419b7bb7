"""`results`: turns the JSON lines of benchmarks into Markdown tables, and puts them between the markers of a document."""

import json
from argparse import Namespace
from collections.abc import Iterable, Sequence
from pathlib import Path

from pipeline.benchmark.measuring import Row, Section
from pipeline.benchmark.reporting import cells_of, conditions_text
from pipeline.common.files import write_atomically

BEGIN, END = "<!-- benchmark results: begin -->", "<!-- benchmark results: end -->"


def print_or_write(args: Namespace) -> int:
    """Prints the tables of args.files, or writes them into args.write. Raises ValueError for a file that cannot be used."""
    text = tables_of(args.files)
    if args.write is None:
        print(text)
        return 0
    write_atomically(args.write, between_markers(args.write, text).encode())
    print(f"{args.write}: the tables of {', '.join(map(str, args.files))}")
    return 0


def tables_of(paths: Sequence[Path]) -> str:
    """A heading, the conditions and a table for each section of the files, in the order of its first row."""
    by_section: dict[str, list[Row]] = {}
    for path in paths:
        for row in rows_of(path):
            by_section.setdefault(row["section"], []).append(row)
    return "\n\n".join(section_text(title, rows) for title, rows in by_section.items())


def rows_of(path: Path) -> list[Row]:
    """The rows that a benchmark wrote. Raises ValueError if the file has none."""
    try:
        rows: list[Row] = [json.loads(line) for line in path.read_text().splitlines()]
        complete = all({"section", "row", "command", "date", "cpu", "cores", "versions"} <= row.keys() for row in rows)
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} cannot be read as JSON lines of a benchmark: {error}") from error
    if not (rows and complete):
        raise ValueError(f"{path} has no rows of a benchmark. Pass a benchmark-*.jsonl of --output.")
    return rows


def section_text(title: str, rows: list[Row]) -> str:
    """The section in Markdown."""
    units = {row.get("unit", "") for row in rows}
    named = [{**row, "row": name_of(row)} for row in rows]
    section = Section(title, named, next(iter(units)) if len(units) == 1 else "median")
    headings, *lines = cells_of(section)
    rule = ["---", *["---:"] * (len(headings) - 1)]
    table = "\n".join(f"| {' | '.join(line)} |" for line in (headings, rule, *lines))
    return f"### {title}\n\n{conditions(rows)}\n\n{table}"


def name_of(row: Row) -> str:
    """The name of a row after that of its group, if it does not begin with it."""
    return row["row"] if row["row"].startswith(row.get("group", "")) else f"{row['group']}: {row['row']}"


def conditions(rows: Iterable[Row]) -> str:
    """Machine, date, versions and command of the rows; a line for each of several."""
    return "\n\n".join(dict.fromkeys(conditions_text(row) for row in rows))


def between_markers(path: Path, text: str) -> str:
    """The document with the text between its markers. Raises ValueError if it lacks them."""
    document = path.read_text() if path.is_file() else ""
    if document.count(BEGIN) != 1 or document.count(END) != 1 or document.index(BEGIN) > document.index(END):
        raise ValueError(f"{path} needs the lines {BEGIN} and {END}, in this order. The tables replace what is between them.")
    start, stop = document.index(BEGIN) + len(BEGIN), document.index(END)
    return f"{document[:start]}\n\n{text}\n\n{document[stop:]}"
