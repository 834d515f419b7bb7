"""A report's sections as one HTML page that needs nothing else, and as Markdown with pictures beside it."""

import base64
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from pipeline.report.figure_style import FAINT, INK, PAPER, Look
from pipeline.report.tables import Cell, Row, Table

# The page asks nobody for anything, whatever a name in it may say.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
PIXELS_PER_POINT = 1.45  # of a figure: its letters are then as large as a table's
MARKDOWN_SPECIAL = re.compile(r"([\\`*_\[\]<>#|~$&])")


@dataclass(frozen=True)
class Figure:
    """One figure: the stem of its files in figures/, what it shows in words, its SVG."""

    stem: str
    alt: str
    svg: bytes


@dataclass(frozen=True)
class Views:
    """One figure over several horizontal axes (epoch, step, time), of which the page shows one."""

    by_axis: Mapping[str, Figure]


@dataclass(frozen=True)
class Picture:
    """A PNG with a caption of a few lines; stem: that of its file in figures/."""

    stem: str
    alt: str
    lines: tuple[str, ...]
    png: bytes


@dataclass(frozen=True)
class Gallery:
    pictures: tuple[Picture, ...]


Block = str | Table | Figure | Views | Gallery  # a str is a paragraph


@dataclass(frozen=True)
class Section:
    id: str
    title: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class Page:
    """overview: terms and what is to be said of them, above all sections."""

    title: str
    overview: tuple[tuple[str, str], ...]
    sections: tuple[Section, ...]


def html_page(page: Page, look_of: Mapping[str, Look]) -> str:
    """The whole page; every word that came from a run is escaped, and the content policy forbids any request."""
    css, js = (Path(__file__).with_name(f"page.{ending}").read_text(encoding="utf-8") for ending in ("css", "js"))
    links = "".join(f'<li><a href="#{section.id}">{escape(section.title)}</a></li>' for section in page.sections)
    terms = "".join(f"<dt>{escape(term)}</dt><dd>{escape(text)}</dd>" for term, text in page.overview)
    sections = "\n".join(html_section(section, look_of) for section in page.sections)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(page.title)}</title>
<link rel="icon" href="data:,">
<style>
{css}</style>
</head>
<body>
<header>
<h1>{escape(page.title)}</h1>
<dl>{terms}</dl>
<nav aria-label="Sections"><ul>{links}</ul></nav>
</header>
<main>
{sections}
</main>
<script>
{js}</script>
</body>
</html>
"""


def html_section(section: Section, look_of: Mapping[str, Look]) -> str:
    blocks = [html_block(block, section, look_of) for block in section.blocks]
    axes = next((tuple(block.by_axis) for block in section.blocks if isinstance(block, Views)), ())
    title = f'<h2 id="{section.id}-title">{escape(section.title)}</h2>'
    content = "\n".join([title, *([switch(axes)] if len(axes) > 1 else []), *blocks])
    return f'<section id="{section.id}" aria-labelledby="{section.id}-title">\n{content}\n</section>'


def switch(axes: Sequence[str]) -> str:
    """The choice of the horizontal axis; hidden until the script runs, and on paper."""
    inputs = "".join(
        f'<label><input type="radio" name="axis" value="{axis}"{" checked" if axis == axes[0] else ""}> {axis}</label>'
        for axis in axes
    )
    return f'<fieldset class="switch" hidden><legend>horizontal axis</legend>{inputs}</fieldset>'


def html_block(block: Block, section: Section, look_of: Mapping[str, Look]) -> str:
    if isinstance(block, str):
        return f"<p>{escape(block)}</p>"
    if isinstance(block, Table):
        return html_table(block, section, look_of)
    if isinstance(block, Figure):
        return f"<figure>{inline_svg(block)}</figure>"
    if isinstance(block, Gallery):
        return f'<ul class="gallery">{"".join(map(html_picture, block.pictures))}</ul>'
    first = next(iter(block.by_axis))
    views = (
        f'<div data-axis="{axis}"{"" if axis == first else " hidden"}>{inline_svg(figure)}</div>'
        for axis, figure in block.by_axis.items()
    )
    return f"<figure>{''.join(views)}</figure>"


def html_picture(picture: Picture) -> str:
    data = base64.b64encode(picture.png).decode()
    lines = "<br>".join(map(escape, picture.lines))
    return f'<li><img src="data:image/png;base64,{data}" alt="{escape(picture.alt)}">{lines}</li>'


def html_table(table: Table, section: Section, look_of: Mapping[str, Look]) -> str:
    """The table with its title where that is not the section's, in a box of its own that scrolls sideways."""
    numeric = [all(is_numeric(row.cells[place]) for row in table.rows) for place in range(len(table.columns))]
    headings = "".join(
        f'<th scope="col"{number_class(right)}><button type="button">{escape(column)}</button></th>'
        for column, right in zip(table.columns, numeric)
    )
    rows = "\n".join(html_row(row, numeric, look_of) for row in table.rows)
    title = "" if table.title == section.title else f"<h3>{escape(table.title)}</h3>"
    note = f"<p>{escape(table.note)}</p>" if table.note else ""
    label = escape(table.title)
    return (
        f'{title}{note}<div class="scroll" role="region" aria-label="{label}" tabindex="0"><table id="table-{table.id}">'
        f"<thead><tr>{headings}</tr></thead>\n<tbody>\n{rows}\n</tbody></table></div>"
    )


def is_numeric(cell: Cell) -> bool:
    return cell.key is None or not isinstance(cell.key, str)


def number_class(right: bool) -> str:
    return ' class="number"' if right else ""


def html_row(row: Row, numeric: Sequence[bool], look_of: Mapping[str, Look]) -> str:
    """A row; one about a run knows the run's index, and its name has the run's colour beside it."""
    look = look_of.get(row.run or "")
    attributes = f' data-run="{look.index}"' if look else ""
    attributes += ' class="marked"' if row.marked else ""
    cells = []
    for cell, right in zip(row.cells, numeric):
        kind = "" if cell.key is None or isinstance(cell.key, str) else ' data-kind="number"'
        key = "" if cell.key is None else f' data-key="{escape(str(cell.key))}"{kind}'
        colour = (
            f'<span class="swatch" style="background:{look.colour}"></span>' if look and cell.text == row.run else ""
        )
        cells.append(f"<td{key}{number_class(right)}>{colour}{escape(cell.text)}</td>")
    return f"<tr{attributes}>{''.join(cells)}</tr>"


def inline_svg(figure: Figure) -> str:
    """matplotlib's SVG as a part of the page: its ids unique there, its colours the page's, its lines known by run."""
    text = figure.svg.decode("utf-8")
    text = text[text.index("<svg") :]
    text = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>|<style.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r'\bid="run-(\d+)-[^"]*"', r'data-run="\1"', text)
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', text))
    text = re.sub(r'\bid="([^"]*)"', lambda found: f'id="{figure.stem}-{found[1]}"' if found[1] in used else "", text)
    text = re.sub(r'(href="#|url\(#)', rf"\g<1>{figure.stem}-", text)
    for colour, variable in ((INK, "--ink"), (FAINT, "--faint"), (PAPER, "--paper")):
        text = text.replace(colour, f"var({variable})")
    view_box = re.search(r'viewBox="[^"]*"', text)
    assert view_box is not None, "matplotlib gives one"
    opening = (
        f'<svg {view_box[0]} role="img" aria-label="{escape(figure.alt)}" xmlns:xlink="http://www.w3.org/1999/xlink">'
    )
    return opening + text[text.index(">") + 1 :]


def markdown_page(page: Page) -> str:
    """The same sections as Markdown; figures are files of figures/, of which the first axis is shown and the others linked."""
    parts = [f"# {markdown_escape(page.title)}"]
    parts.append("\n".join(f"- {markdown_escape(term)}: {markdown_escape(text)}" for term, text in page.overview))
    for section in page.sections:
        parts.append(f"## {markdown_escape(section.title)}")
        parts += [markdown_block(block, section) for block in section.blocks]
    return "\n\n".join(parts) + "\n"


def markdown_escape(text: str) -> str:
    return MARKDOWN_SPECIAL.sub(r"\\\1", " ".join(text.split()))


def markdown_block(block: Block, section: Section) -> str:
    if isinstance(block, str):
        return markdown_escape(block)
    if isinstance(block, Figure):
        return markdown_image(block.alt, block.stem)
    if isinstance(block, Gallery):
        return "\n\n".join(
            f"{markdown_image(picture.alt, picture.stem)}\\\n{markdown_escape(', '.join(picture.lines))}"
            for picture in block.pictures
        )
    if isinstance(block, Views):
        first, *others = block.by_axis.items()
        links = ", ".join(f"[by {axis}](figures/{figure.stem}.png)" for axis, figure in others)
        return markdown_image(first[1].alt, first[1].stem) + (f"\n\nThe same {links}." if links else "")
    return markdown_table(block, section)


def markdown_image(alt: str, stem: str) -> str:
    return f"![{markdown_escape(alt)}](figures/{stem}.png)"


def markdown_table(table: Table, section: Section) -> str:
    lines = [f"| {' | '.join(map(markdown_escape, table.columns))} |"]
    numeric = [all(is_numeric(row.cells[place]) for row in table.rows) for place in range(len(table.columns))]
    lines.append(f"| {' | '.join('---:' if right else '---' for right in numeric)} |")
    for row in table.rows:
        first, *others = (markdown_escape(cell.text) for cell in row.cells)
        lines.append(f"| {' | '.join([f'**{first}**' if row.marked else first, *others])} |")
    title = "" if table.title == section.title else f"### {markdown_escape(table.title)}\n\n"
    note = f"{markdown_escape(table.note)}\n\n" if table.note else ""
    return title + note + "\n".join(lines)
