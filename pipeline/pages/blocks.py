"""The blocks of a page as plain values: tables of cells, figures, galleries of pictures, sections."""

from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.common.console import percent

SortKey = float | str | None


@dataclass(frozen=True)
class Cell:
    """text: to show; key: to sort by, None if the value is unknown."""

    text: str
    key: SortKey = None


@dataclass(frozen=True)
class Row:
    """run: the name of the row's run, if it has one; marked: whether the run reaches the target."""

    cells: tuple[Cell, ...]
    run: str | None = None
    marked: bool = False


@dataclass(frozen=True)
class Table:
    """columns: headings, with units; note: an explanation of the table."""

    id: str
    title: str
    note: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]


def words(text: str) -> Cell:
    return Cell(text, text.lower())


def count(value: float | None, form: str = ",.0f", unit: str = "") -> Cell:
    return Cell("-") if value is None else Cell(f"{value:{form}}{unit}", value)


def fraction(value: float | None) -> Cell:
    return Cell(percent(value), value)


@dataclass(frozen=True)
class Figure:
    """One figure. stem: name of its files in figures/ without the ending; alt: description; svg: the SVG file."""

    stem: str
    alt: str
    svg: bytes


@dataclass(frozen=True)
class Views:
    """One figure with several horizontal axes (epoch, step, time); the page shows one of them at a time."""

    by_axis: Mapping[str, Figure]


@dataclass(frozen=True)
class Picture:
    """A PNG or JPEG with a caption of a few lines. stem: name of its file in figures/ without the ending."""

    stem: str
    alt: str
    lines: tuple[str, ...]
    content: bytes


@dataclass(frozen=True)
class Gallery:
    """title: a heading, empty for none; wide: whether a picture may be as wide as the page."""

    pictures: tuple[Picture, ...]
    title: str = ""
    wide: bool = False


Block = str | Table | Figure | Views | Gallery  # a str is a paragraph


@dataclass(frozen=True)
class Section:
    id: str
    title: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class Page:
    """overview: pairs of term and text at the top of the page."""

    title: str
    overview: tuple[tuple[str, str], ...]
    sections: tuple[Section, ...]
