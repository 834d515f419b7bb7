"""Renders a page as one self-contained HTML page, and as Markdown with separate figure files."""

import base64
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from xml.etree import ElementTree

from pipeline.pages.blocks import Block, Cell, Figure, Gallery, Page, Section, Table, Views
from pipeline.pages.figure_style import FAINT, INK, PAPER, Look

SVG = "http://www.w3.org/2000/svg"
HREF = "{http://www.w3.org/1999/xlink}href"
RUN_ID = re.compile(r"run-(\d+)-")  # ids of Look.line
JPEG_START = b"\xff\xd8"
MARKDOWN_SPECIAL = re.compile(r"([\\`*_\[\]<>#|~$&])")

ElementTree.register_namespace("", SVG)
ElementTree.register_namespace("xlink", "http://www.w3.org/1999/xlink")


def html_page(page: Page, look_of: Mapping[str, Look]) -> str:
    """The HTML page. jinja2 escapes all text of runs, and the content security policy forbids requests."""
    import jinja2
    from markupsafe import Markup

    folder = Path(__file__).parent
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    kinds: dict[str, type] = {"table": Table, "figure": Figure, "views": Views, "gallery": Gallery}
    environment.tests |= {name: partial(is_a, kind) for name, kind in kinds.items()}
    environment.filters |= {"inline_svg": lambda figure: Markup(inline_svg(figure)), "data_uri": data_uri}
    own = {ending: Markup((folder / f"page.{ending}").read_text(encoding="utf-8")) for ending in ("css", "js")}
    helpers = {"axes_of": axes_of, "numeric_columns": numeric_columns, "is_numeric": is_numeric}
    template = environment.get_template("page.html.jinja")
    return template.render(page=page, look_of=look_of, **own, **helpers)


def is_a(kind: type, block: Block) -> bool:
    return isinstance(block, kind)


def data_uri(content: bytes) -> str:
    """A PNG or JPEG as the address of an image."""
    kind = "jpeg" if content.startswith(JPEG_START) else "png"
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def axes_of(section: Section) -> tuple[str, ...]:
    """The horizontal axes of a section's figures that the page can switch between."""
    return next((tuple(block.by_axis) for block in section.blocks if isinstance(block, Views)), ())


def numeric_columns(table: Table) -> list[bool]:
    """For each column, whether all its cells are numbers or empty."""
    return [all(is_numeric(row.cells[place]) for row in table.rows) for place in range(len(table.columns))]


def is_numeric(cell: Cell) -> bool:
    return not isinstance(cell.key, str)


def inline_svg(figure: Figure) -> str:
    """The figure's SVG as an element of the page, with unique ids, the page's colours, and data-run on the lines of runs."""
    svg = ElementTree.fromstring(figure.svg)
    for parent in list(svg.iter()):
        for child in [child for child in parent if child.tag in (f"{{{SVG}}}metadata", f"{{{SVG}}}style")]:
            parent.remove(child)
    for element in svg.iter():
        for name, value in element.attrib.items():
            for colour, variable in ((INK, "--ink"), (FAINT, "--faint"), (PAPER, "--paper")):
                value = value.replace(colour, f"var({variable})")
            if name == HREF:
                value = value.replace("#", f"#{figure.stem}-")
            element.set(name, value.replace("url(#", f"url(#{figure.stem}-"))
        id = element.attrib.pop("id", None)
        run = RUN_ID.match(id or "")
        if run is not None:
            element.set("data-run", run[1])
        elif id is not None:
            element.set("id", f"{figure.stem}-{id}")
    svg.attrib = {"viewBox": svg.attrib["viewBox"], "role": "img", "aria-label": figure.alt}
    return ElementTree.tostring(svg, encoding="unicode")


def markdown_page(page: Page) -> str:
    """The page as Markdown with the files of figures/. Of Views it shows the first axis and links to the others."""
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
    lines.append(f"| {' | '.join('---:' if right else '---' for right in numeric_columns(table))} |")
    for row in table.rows:
        first, *others = (markdown_escape(cell.text) for cell in row.cells)
        lines.append(f"| {' | '.join([f'**{first}**' if row.marked else first, *others])} |")
    title = "" if table.title == section.title else f"### {markdown_escape(table.title)}\n\n"
    note = f"{markdown_escape(table.note)}\n\n" if table.note else ""
    return title + note + "\n".join(lines)
