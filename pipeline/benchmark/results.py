"""`results`: turns the JSON lines of benchmarks into Markdown tables, and puts them between the markers of a document."""

from argparse import Namespace
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from pipeline.benchmark.measuring import Row, Section
from pipeline.benchmark.reporting import cells_of, conditions_text, plain, read_rows
from pipeline.common.files import to_json, write_atomically

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
    """A heading for each section of the files, in the order of its first row, and for each machine its conditions and a table.

    A row that several files have appears once.
    """
    by_section: dict[str, list[Row]] = {}
    for path in paths:
        for row in with_devices(read_rows(path)):
            of_section = by_section.setdefault(row["section"], [])
            if row not in of_section:
                of_section.append(row)
    return "\n\n".join(section_text(title, rows) for title, rows in by_section.items())


def with_devices(rows: list[Row]) -> list[Row]:
    """The rows, those without a device with that of their section, as a row of a peer that is not installed."""
    devices = {row["section"]: row["device"] for row in rows if "device" in row}
    return [{**({"device": devices[row["section"]]} if row["section"] in devices else {}), **row} for row in rows]


def section_text(title: str, rows: list[Row]) -> str:
    """The section in Markdown."""
    machines: dict[str, list[Row]] = {}
    for row in rows:
        machine = to_json([row.get("device"), row["cpu"], row["cores"], row["versions"]])
        machines.setdefault(machine, []).append(row)
    return "\n\n".join([f"### {plain(title)}", *map(machine_text, machines.values())])


def machine_text(rows: list[Row]) -> str:
    """The conditions, the table and the notes of the rows of one section that one machine measured."""
    units = {row.get("unit", "") for row in rows if row.get("median") is not None}
    curve = ("lr", "smoothed_loss") if all("lr" in row for row in rows) else None
    section = Section("", numbered(rows), units.pop() if len(units) == 1 else "median", curve=curve)
    headings, *lines = cells_of(section)
    rule = ["---", *["---:"] * (len(headings) - 1)]
    table = "\n".join(f"| {' | '.join(line)} |" for line in (headings, rule, *lines))
    notes = dict.fromkeys(note for row in rows for note in row.get("notes", []))
    return "\n\n".join([conditions(rows), table, *notes])


def numbered(rows: list[Row]) -> list[Row]:
    """The rows with name_of as their names; a name that appeared before has a number behind it, as of a repeated measurement."""
    seen: Counter[str] = Counter()
    named = []
    for row in rows:
        name = name_of(row)
        seen[name] += 1
        named.append({**row, "row": name if seen[name] == 1 else f"{name} ({seen[name]})"})
    return named


def name_of(row: Row) -> str:
    """The name of a row after that of its group, if it does not begin with it."""
    return row["row"] if row["row"].startswith(row.get("group", "")) else f"{row['group']}: {row['row']}"


def conditions(rows: Iterable[Row]) -> str:
    """Machine, date, versions and command of the rows; a line for each of several."""
    return "\n\n".join(dict.fromkeys(conditions_text(row) for row in rows))


def between_markers(path: Path, text: str) -> str:
    """The document with the text between its markers, with the line ends of the document. Raises ValueError if it lacks them."""
    try:
        document = path.read_bytes().decode()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}. It needs the lines {BEGIN} and {END}.") from error
    if document.count(BEGIN) != 1 or document.count(END) != 1 or document.index(BEGIN) > document.index(END):
        raise ValueError(f"{path} needs the lines {BEGIN} and {END}, in this order. The tables replace what is between them.")
    start, stop = document.index(BEGIN) + len(BEGIN), document.index(END)
    between = f"\n\n{text}\n\n"
    return document[:start] + (between.replace("\n", "\r\n") if "\r\n" in document else between) + document[stop:]
